# Sourced by the scripts beside it: makes and updates .venv in the project's root.
#
#   prepare_environment EXTRA     EXTRA is empty, test or train
#
# A stamp per extra holds a hash of pyproject.toml and is written last, so that an
# interrupted installation is done again and a finished one costs milliseconds.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

prepare_environment() {
    local extra=$1 hash stamp
    hash=$(cksum <"$root/pyproject.toml")
    stamp="$venv/.installed${extra:+-$extra}"
    if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then
        return
    fi
    mkdir -p "$venv"
    (
        # Two callers at once: the second waits and then finds the work done.
        if command -v flock >/dev/null; then flock 9; fi
        if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then exit 0; fi
        install_into_venv "$extra"
        printf '%s\n' "$hash" >"$stamp"
    ) 9>"$venv/.lock"
}

install_into_venv() {
    local extra=$1 log="$venv/install.log" python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
        exit 1
    fi
    echo "setting up .venv (once, a few minutes)" >&2
    # The pip that comes with Python 3.11 cannot resolve modular's dependencies.
    if ! {
        { [[ -x $venv/bin/pip ]] || "$python" -m venv "$venv"; } &&
            "$venv/bin/python" -m pip install --upgrade "pip>=25.1" &&
            "$venv/bin/python" -m pip install --editable "$root${extra:+[$extra]}"
    } >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        echo "error: the installation failed; all of its output is in $log" >&2
        exit 1
    fi
}
