# Sourced by the scripts beside it: makes and updates .venv in the project's root.
#
#   prepare_environment EXTRA     EXTRA is base, test or train
#
# One stamp an extra holds a checksum of what was installed. Stamps are removed before
# anything is changed and written last, so that an interrupted installation is done
# again; a finished one costs milliseconds.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

prepare_environment() {
    local extra=$1 hash
    # The place counts too: an editable installation points at it. So does the version,
    # which lives outside pyproject.toml.
    hash=$({
        printf '%s\n' "$root"
        grep '^__version__' "$root/max_diffusion/__init__.py"
        cat "$root/pyproject.toml"
    } | cksum)
    if is_installed "$extra" "$hash"; then return; fi
    (
        # Two callers at once: the second waits, then finds the work done. The lock is
        # on the folder itself, which leaves no file behind.
        if command -v flock >/dev/null; then flock 9; fi
        if is_installed "$extra" "$hash"; then exit 0; fi
        install_into_venv "$extra"
        printf '%s\n' "$hash" >"$venv/.installed-$extra"
    ) 9<"$root"
}

is_installed() {
    local extra=$1 hash=$2 stamp stamps
    [[ -x $venv/bin/python ]] || return 1
    stamps=("$venv/.installed-$extra")
    # Whatever extra was installed, the base came with it.
    [[ $extra != base ]] || stamps=("$venv"/.installed-*)
    for stamp in "${stamps[@]}"; do
        if [[ -f $stamp && $(<"$stamp") == "$hash" ]]; then return 0; fi
    done
    return 1
}

install_into_venv() {
    local what="$root" log="$venv/install.log" python=""
    [[ $1 == base ]] || what+="[$1]"
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        # None yet, or its interpreter has been removed from this machine.
        python=$(find_python)
        rm -rf "$venv"
        mkdir "$venv"
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$venv/bin/python" # cut off before it had pip
    fi
    rm -f "$venv"/.installed-*
    echo "setting up .venv (once, a few minutes)" >&2
    # The pip that comes with Python 3.11 cannot resolve modular's dependencies.
    if ! {
        { [[ -z $python ]] || "$python" -m venv "$venv"; } &&
            "$venv/bin/python" -m pip install --upgrade "pip>=26" &&
            "$venv/bin/python" -m pip install --editable "$what"
    } >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        echo "error: the installation failed; all of its output is in $log" >&2
        exit 1
    fi
}

find_python() {
    local python
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
        then
            printf '%s\n' "$python"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
    return 1
}
