#!/bin/sh
# mutate.sh DIR [MUTANTS [SEED]]: tests the tests. Takes random places in the implementation, flips one operator or constant at
# a time, builds, and runs the tests that reach the line, quick ones first, until one fails. Prints the mutants that no test
# noticed; each is either a hole in the tests or stands in tests/unnoticed.txt with the reason why none can. JOBS mutants at a time
# (as many as processors). Who noticed what goes to DIR/caught.txt. Last line: `N caught, N explained, N survived, of N`; fails when
# fewer than nine in ten of those without an explanation are caught.
# Which test reaches which line is asked of gcov once, before the first mutant: three minutes. A mutant then costs 2 s to compile,
# and what its tests take.
dir=$1 mutants=${2:-200} seed=${3:-1}
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && dir=$(cd "$dir" && pwd) && cd "$top" || exit 1
: "${CC:=cc}" "${JOBS:=$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 2)}"
flags='-std=c99 -D_POSIX_C_SOURCE=200809L -Itests -w'

# A test is VARIANT:NAME; f float, d double, F and D the same for a private test, which has the implementation in itself.
all= late=
for t in ${TESTS:-selftest hostile scorer loss metrics train failures threads errors model extending layers_attention \
         models_torchmil_abmil models_millab2 ops_attention ops_tokens models_millab1 files edges tape kernels ops backend \
         calls failures_pieces}; do
    asks=$(sed -n '1s/^\/\/ build: *//p' "tests/test_$t.c")
    case $asks in *private*) f=F d=D ;; *) f=f d=d ;; esac
    all="$all $f:$t"
    case $t in tape|backend|model|models_millab1) continue ;; esac       # where double sees no more than float, or is slow
    case $asks in *double*) late="$late $d:$t" ;; esac
done
all="$all$late"

# slow ROOM: half a minute of finite differences through whole models, for the rooms whose gradients nothing else checks.
slow() { case $1 in op-table|layer-code|model-blocks) echo d:models_millab1 ;; esac; }

# build: makes mil_NAME.o of $work/mil.h or a program of its own once per mutant. No optimiser where compiling is most of the cost.
object() { [ -f "$work/mil_$1.o" ] || $CC $flags $2 -I"$work" -c -o "$work/mil_$1.o" tests/mil_impl.c 2> /dev/null; }
build() {
    case $1 in
    f) object f -O0 && $CC -o "$work/one" "$dir/f_$2.o" "$work/mil_f.o" -lm -lpthread ;;
    d) object d '-DMIL_REAL=double -O1' && $CC -o "$work/one" "$dir/d_$2.o" "$work/mil_d.o" -lm -lpthread ;;
    F|D) own= ; [ "$1" = D ] && own=-DMIL_REAL=double
        sed 's|"../mil.h"|"mil.h"|' "tests/test_$2.c" > "$work/test_$2.c"
        opt=-O0
        case $2 in ops|kernels) opt=-O1 ;; esac            # long enough to be worth it
        $CC $flags $own -I"$work" $opt -o "$work/one" "$work/test_$2.c" -lm -lpthread ;;
    esac > "$work/out.txt" 2>&1
}
# explained LINE FROM TO: whether tests/unnoticed.txt has this flip of this line.
explained() {
    sed -n "$1p" "$dir/mil.h" | awk -v flip="$2 -> $3" '
        BEGIN { gsub(/  +/, " ", flip); gsub(/^ | $/, "", flip) }
        NR == FNR { line = $0; next }
        { at = index($0, " | "); rest = substr($0, at + 3); end = index(rest, " | "); what = substr($0, 1, at - 1); gsub(/^ | $/, "", what)
          if (at && what == flip && index(line, substr(rest, 1, end - 1))) found = 1 }
        END { exit !found }' - tests/unnoticed.txt
}

# folder NAME: where tests of one process run, with the cases beside it and a place for their files
folder() { work="$dir/$1"; mkdir -p "$work/build" && ln -sfn "$top/tests" "$work/tests"; }

# suite TEST...: runs the tests with $work/mil.h, sets `noticed` to the first that fails. Time is the processor's own, so that
# a busy machine catches nothing; a mutant that waits for ever is ended all the same.
suite() {
    rm -f "$work"/mil_?.o
    for noticed in "$@"; do
        build "${noticed%%:*}" "${noticed#*:}" || return
        run || return
    done
    noticed=
}
run() { ( cd "$work" && ulimit -t "${TEST_SECONDS:-120}" && ulimit -v 8000000; exec timeout 1800 ./one ) < /dev/null > "$work/out.txt" 2>&1; }

# reach VARIANT NAME: the lines of mil.h that the test runs go to $dir/reach/VARIANT:NAME, its seconds before them.
reach() {
    start=$(date +%s)
    cover="--coverage -O0"
    case $1 in
    f|d) [ -f "$work/mil_$1.o" ] || object "$1" "$cover $([ "$1" = d ] && echo -DMIL_REAL=double)" || return
        $CC -o "$work/one" "$dir/$1_$2.o" "$work/mil_$1.o" --coverage -lm -lpthread && notes=mil_$1 ;;
    F|D) own= ; [ "$1" = D ] && own=-DMIL_REAL=double
        sed 's|"../mil.h"|"mil.h"|' "tests/test_$2.c" > "$work/test_$2.c"
        $CC $flags $own -I"$work" $cover -o "$work/one" "$work/test_$2.c" -lm -lpthread && notes=one-test_$2 ;;
    esac || return
    rm -f "$work"/*.gcda
    TEST_SECONDS=900 run || return
    echo "$(($(date +%s) - start))" > "$dir/reach/$1:$2"
    ( cd "$work" && ${GCOV:-gcov} -t "$notes.gcda" 2> /dev/null ) | awk -F: '
        / 0:Source:/ { here = $NF ~ /mil\.h$/ }
        here && $1 !~ /[-#=]$/ { print $2 + 0 }' >> "$dir/reach/$1:$2"
}

case $mutants in worker)                                   # a process of its own for every JOBS-th place
    job=$seed
    folder work$job
    i=0
    while IFS='~' read -r place from to; do
        i=$((i + 1))
        [ $((i % JOBS)) = "$job" ] || continue
        set -- $place
        awk -v line="$1" -v column="$2" -v size="$3" -v to="$to" 'NR == line { $0 = substr($0, 1, column - 1) to substr($0, column + size) } { print }' "$dir/mil.h" > "$work/mil.h"
        room=$(awk -v line="$1" 'NR > line { exit } /^\/\/ ==== >>/ { r = $3; gsub(/[>:]/, "", r) } END { print r }' "$dir/mil.h")
        suite $(grep -lx "$1" "$dir"/reach/*:* | sed 's|.*/||' > "$work/met.txt"; grep -qx "$1" "$dir/code.txt" || cp "$dir/order.txt" "$work/met.txt"
                grep -Fxf "$work/met.txt" "$dir/order.txt"; slow "$room") 2> /dev/null
        what="mil.h:$1: '$from' -> '$to': $(sed -n "$1p" "$dir/mil.h" | sed 's/^ *//' | cut -c1-110)"
        if [ -n "$noticed" ]; then
            printf '%s: %s\n' "$noticed" "$what" >> "$dir/caught.txt"
        elif explained "$1" "$from" "$to"; then
            printf '%s\n' "$what" >> "$dir/explained.txt"
        else
            printf 'survived: %s: %s\n' "$room" "$what" | tee -a "$dir/survived.txt"
        fi
    done < "$dir/places.txt"
    exit 0
    ;;
esac

for t in $all d:models_millab1; do
    case $t in
    f:*) $CC $flags -I. -O1 -c -o "$dir/f_${t#*:}.o" "tests/test_${t#*:}.c" || exit 1 ;;
    d:*) $CC $flags -DMIL_REAL=double -I. -O1 -c -o "$dir/d_${t#*:}.o" "tests/test_${t#*:}.c" || exit 1 ;;
    esac
done
folder work0
cp mil.h "$dir/mil.h"                                      # edits of mil.h meanwhile change nothing here
cp mil.h "$work/mil.h"
rm -rf "$dir/reach" && mkdir "$dir/reach"
for t in $all; do
    reach "${t%%:*}" "${t#*:}" > "$work/reach.txt" 2>&1 && continue
    echo "the header as it is fails $t: nothing to learn from mutants"
    head -n 10 "$work/reach.txt" "$work/out.txt"
    exit 1
done
for t in $all; do echo "$(head -n 1 "$dir/reach/$t") $t"; done | sort -n -s -k1,1 | sed 's/.* //' > "$dir/order.txt"       # quick ones first
( cd "$work" && ${GCOV:-gcov} -t mil_f.gcda 2> /dev/null ) | awk -F: '/ 0:Source:/ { here = $NF ~ /mil\.h$/ } here && $1 !~ /-$/ { print $2 + 0 }' > "$dir/code.txt"
# What is compiled at all on this machine.
$CC $flags -I"$work" -E tests/mil_impl.c | awk '/^# [0-9]/ { here = $3 ~ /mil\.h"$/; line = $2; next } here && NF { print line } { line++ }' | sort -un > "$dir/compiled.txt"

# The places: lines of the implementation that are neither preprocessor, comment, declaration of text nor inside a macro.
awk -v mutants="$mutants" -v seed="$seed" -v places="$dir/compiled.txt" '
    BEGIN { srand(seed)
        while ((getline one < places) > 0) compiled[one + 0] = 1
        from[1] = " < "; to[1] = " <= "; from[2] = " <= "; to[2] = " < "; from[3] = " > "; to[3] = " >= "; from[4] = " >= "; to[4] = " > "
        from[5] = " == "; to[5] = " != "; from[6] = " != "; to[6] = " == "; from[7] = " + "; to[7] = " - "; from[8] = " - "; to[8] = " + "
        from[9] = " && "; to[9] = " || "; from[10] = " || "; to[10] = " && "; from[11] = " * "; to[11] = " + "; from[12] = "++"; to[12] = "--"
        from[13] = " 0"; to[13] = " 1"; from[14] = " 1"; to[14] = " 0"; from[15] = " += "; to[15] = " -= "; kinds = 15 }
    /^#if .*MIL_IMPLEMENTATION/ { inside = 1 }
    !inside || !(NR in compiled) { next }
    /MIL_ASSERT\(|MILI_PREFETCH/ || /^ *#/ || /\\$/ || /^ *\/\// || /^(MIL_DEF|MILI_FN|static|typedef)/ { next }
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
' "$dir/mil.h" > "$dir/places.txt"

: > "$dir/caught.txt"
: > "$dir/explained.txt"
: > "$dir/survived.txt"
export JOBS CC
job=0
while [ $job -lt "$JOBS" ]; do
    sh "$top/tests/mutate.sh" "$dir" worker $job &
    job=$((job + 1))
done
wait
count() { wc -l < "$dir/$1.txt" | tr -d ' '; }
echo "$(count caught) caught, $(count explained) explained, $(count survived) survived, of $mutants"
[ $(($(count caught) * 10)) -ge $((($(count caught) + $(count survived)) * 9)) ]
