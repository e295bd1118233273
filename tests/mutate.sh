#!/bin/sh
# mutate.sh DIR [MUTANTS [SEED]]: tests the tests. Takes random places in the implementation, flips one operator or constant at
# a time, builds, and runs the suite until a test fails. Prints the mutants that no test noticed; each is either a hole in the
# tests or makes no difference, which a person decides. Slow: some seconds per mutant. Last line: `N caught, N survived`.
dir=$1 mutants=${2:-200} seed=${3:-1}
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && dir=$(cd "$dir" && pwd) && cd "$top" || exit 1
: "${CC:=cc}"
flags='-std=c99 -D_POSIX_C_SOURCE=200809L -Itests -w'
# Quick and general tests first. A private test has the implementation in itself and is built anew for each mutant.
public= private=
for t in ${TESTS:-selftest hostile scorer loss metrics tape train failures models_millab1 models_millab2 ops_attention ops_tokens files ops}; do
    if head -n 1 "tests/test_$t.c" | grep -q private || grep -q 'define MIL_IMPLEMENTATION' "tests/test_$t.c"; then private="$private $t"; continue; fi
    public="$public $t"
    $CC $flags -I. -O1 -c -o "$dir/$t.o" "tests/test_$t.c" || exit 1
done

# suite: runs everything with $dir/mil.h, sets `noticed` to the first that fails
suite() {
    noticed=compiler
    $CC $flags -I"$dir" -O1 -c -o "$dir/mil.o" tests/mil_impl.c 2> /dev/null || return
    for noticed in $public; do
        $CC -o "$dir/one" "$dir/$noticed.o" "$dir/mil.o" -lm -lpthread 2> "$dir/out.txt" || return
        timeout "${TEST_SECONDS:-120}" "$dir/one" > "$dir/out.txt" 2>&1 || return
    done
    for noticed in $private; do
        sed 's|"../mil.h"|"mil.h"|' "tests/test_$noticed.c" > "$dir/test_$noticed.c"
        $CC $flags -I"$dir" -O1 -o "$dir/one" "$dir/test_$noticed.c" -lm -lpthread 2> "$dir/out.txt" || return
        timeout "${TEST_SECONDS:-120}" "$dir/one" > "$dir/out.txt" 2>&1 || return
    done
    noticed=
}
cp mil.h "$dir/mil.h"
suite
if [ -n "$noticed" ]; then
    echo "the header as it is fails $noticed: nothing to learn from mutants"
    head -n 10 "$dir/out.txt"
    exit 1
fi

# The places: lines of the implementation that are neither preprocessor, comment, declaration of text nor inside a macro.
awk -v mutants="$mutants" -v seed="$seed" '
    BEGIN { srand(seed);
        from[1] = " < "; to[1] = " <= "; from[2] = " <= "; to[2] = " < "; from[3] = " > "; to[3] = " >= "; from[4] = " >= "; to[4] = " > "
        from[5] = " == "; to[5] = " != "; from[6] = " != "; to[6] = " == "; from[7] = " + "; to[7] = " - "; from[8] = " - "; to[8] = " + "
        from[9] = " && "; to[9] = " || "; from[10] = " || "; to[10] = " && "; from[11] = " * "; to[11] = " + "; from[12] = "++"; to[12] = "--"
        from[13] = " 0"; to[13] = " 1"; from[14] = " 1"; to[14] = " 0"; from[15] = " += "; to[15] = " -= "; kinds = 15 }
    /^#if .*MIL_IMPLEMENTATION/ { inside = 1 }
    !inside { next }
    /^ *#/ || /\\$/ || /^ *\/\// || /^(MIL_DEF|MILI_FN|static|typedef)/ { next }
    {
        code = $0
        sub(/ *\/\/.*/, "", code)
        if (code ~ /"/) next
        for (k = 1; k <= kinds; k++) {
            at = 1
            while ((p = index(substr(code, at), from[k])) > 0) {
                where = at + p - 1
                next_char = substr(code, where + length(from[k]), 1)
                if (!(k >= 13 && k <= 14 && next_char ~ /[0-9.xeEa-zA-Z_]/)) { line[++count] = NR; column[count] = where; kind[count] = k }
                at = where + length(from[k])
            }
        }
    }
    END { for (i = 0; i < mutants; i++) { c = 1 + int(rand() * count); k = kind[c]; printf "%d %d %d~%s~%s\n", line[c], column[c], length(from[k]), from[k], to[k] } }
' mil.h > "$dir/places.txt"

caught=0 survived=0 i=0
while IFS='~' read -r place from to; do
    i=$((i + 1))
    set -- $place
    awk -v line="$1" -v column="$2" -v size="$3" -v to="$to" 'NR == line { $0 = substr($0, 1, column - 1) to substr($0, column + size) } { print }' mil.h > "$dir/mil.h"
    suite
    if [ -n "$noticed" ]; then
        caught=$((caught + 1))
    else
        survived=$((survived + 1))
        echo "survived: mil.h:$1: '$from' -> '$to': $(sed -n "$1p" mil.h | sed 's/^ *//' | cut -c1-110)"
    fi
done < "$dir/places.txt"
echo "$caught caught, $survived survived, of $i"
