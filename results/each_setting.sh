# Sourced by the lists of settings: makes a run of every setting, or of those named, JOBS side by side (1).
# The list defines `settings`, lines of NAME OPTIONS, and `run NAME OPTIONS...`, and exports what `run` uses.
each_setting() {   # [SETTING...]
    local known=$(settings | cut -d' ' -f1)
    for o in "$@"; do
        grep -qxF -- "$o" <<< "$known" || { echo "no setting $o: there are" $known >&2; return 2; }
    done
    [ $# -gt 0 ] || set -- $known
    for o in "$@"; do settings | awk -v name="$o" '$1 == name'; done | xargs -P "${JOBS:-1}" -L 1 bash -c 'run "$@"' run
}
export -f run
