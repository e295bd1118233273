#!/bin/sh
# cpus.sh DIR [TEST...]: the tests on other CPUs, built by their cross compilers, linked statically and run under qemu-user.
# Emulated machines are slow: the largest bags and most of the random rounds are left out there (MIL_TEST_SMALL= for all).
# TESTs are names without test_, by default all but those that fork a compiler. The last line is `N passed, N failed`.
dir=$1
shift
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && dir=$(cd "$dir" && pwd) && cd "$top" && mkdir -p build || exit 1   # tests write below build/
[ -n "${MIL_TEST_SMALL-1}" ] && export MIL_TEST_SMALL="${MIL_TEST_SMALL-1}" || unset MIL_TEST_SMALL
passed=0 failed=0
tests=${*:-$(ls tests/test_*.c | sed 's|tests/test_||; s|\.c$||')}
flags='-std=c99 -D_POSIX_C_SOURCE=200809L -D_FILE_OFFSET_BITS=64 -I. -Itests -O2 -static'
i386=i686-linux-gnu-gcc:qemu-i386:
command -v "$(sh tests/find_cc.sh "${i386%%:*}")" > /dev/null || i386=gcc:qemu-i386:-m32
table="aarch64-linux-gnu-gcc:qemu-aarch64: arm-linux-gnueabihf-gcc:qemu-arm: riscv64-linux-gnu-gcc:qemu-riscv64: s390x-linux-gnu-gcc:qemu-s390x: $i386 gcc:qemu-x86_64: musl-gcc::"
for row in ${CPUS:-$table}; do
    cc=$(sh tests/find_cc.sh "${row%%:*}") rest=${row#*:}
    run=${rest%%:*} extra=${rest#*:}
    name="$cc $extra${run:+ under $run}"
    if ! command -v "$cc" > /dev/null || { [ -n "$run" ] && ! command -v "$run" > /dev/null; } ||
       ! printf '#include <errno.h>\nint main(void) { return 0; }' | $cc $extra -static -x c - -o "$dir/try" 2> /dev/null; then
        echo "skip $name: not installed"
        continue
    fi
    p=0 f=0
    object="$dir/$(echo "$cc$extra" | tr -c 'a-zA-Z0-9\n' _).o"
    if ! $cc $extra $flags -c -o "$object" tests/mil_impl.c > "$dir/out.txt" 2>&1; then
        echo "FAIL $name: mil.h does not compile"
        head -n 10 "$dir/out.txt"
        failed=$((failed + 1))
        continue
    fi
    for t in $tests; do
        head -n 1 "tests/test_$t.c" | grep -q '^// build: double$' && continue
        own="$object"
        head -n 1 "tests/test_$t.c" | grep -q private && own=
        if $cc $extra $flags -O1 -o "$dir/one" "tests/test_$t.c" $own -lm -lpthread > "$dir/out.txt" 2>&1; then
            $run "$dir/one" > "$dir/out.txt" 2>&1
            status=$?
        else status=build; fi
        line=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$dir/out.txt" | tail -n 1)
        a=${line% *} b=${line#* }
        [ -n "$line" ] || { a=0; b=1; }
        [ "$status" = 0 ] || [ "$b" != 0 ] || b=1
        p=$((p + a)) f=$((f + b))
        if [ "$b" != 0 ]; then
            echo "---- $name: $t ($status)"
            grep -v '^ *kernels' "$dir/out.txt" | tail -n 12
        fi
    done
    echo "$name: $p passed, $f failed"
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed != 0 ]
