#!/bin/sh
# warnings.sh DIR: the header, the tool, the examples and the tests under strict warnings, all of them errors, with every
# one of gcc and clang that is installed. One optimised build each, which sees data flow; the other standards by syntax alone.
dir=$1
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" || exit 1
passed=0 failed=0
both='-Wall -Wextra -Wshadow -Wpedantic -Wundef -Wdouble-promotion -Wcast-qual -Wpointer-arith -Wwrite-strings -Wvla -Werror'
only_c='-Wstrict-prototypes -Wmissing-prototypes'
printf '#define MIL_IMPLEMENTATION\n#include "mil.h"\n' > "$dir/impl.c"

one() {
    if "$@" > "$dir/out.txt" 2>&1; then
        passed=$((passed + 1))
    else
        echo "FAIL $*"
        head -n 20 "$dir/out.txt"
        failed=$((failed + 1))
    fi
}

found=0
for cc in gcc clang; do
    if ! $cc --version > /dev/null 2>&1; then
        echo "skip $cc: not installed"
        continue
    fi
    found=1
    cc="$cc -I$top -I$top/tests -D_POSIX_C_SOURCE=200809L $both"
    for real in float double; do
        one $cc $only_c -std=c99 -O2 -DMIL_REAL=$real -c -o "$dir/impl.o" "$dir/impl.c"
        one $cc $only_c -std=c11 -fsyntax-only -DMIL_REAL=$real "$dir/impl.c"
        for std in c++11 c++17; do one $cc -x c++ -std=$std -fsyntax-only -DMIL_REAL=$real "$dir/impl.c"; done
    done
    one $cc -x c++ -std=c++11 -O1 -c -o "$dir/impl.o" "$dir/impl.c"
    for source in "$top"/tools/*.c "$top"/examples/*.c "$top"/tests/*.c; do
        [ -f "$source" ] || continue
        one $cc -std=c99 -fsyntax-only "$source"
    done
done
[ $found = 1 ] || { echo 'FAIL neither gcc nor clang is installed'; failed=1; }
echo "$passed passed, $failed failed"
[ $failed = 0 ]
