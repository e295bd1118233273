#!/bin/sh
# matrix.sh DIR: the self-test's program built by every compiler, language, optimisation and mode that is here, and run; each
# configuration macro in the same way. The last line is `N passed, N failed`.
dir=$1
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" || exit 1
passed=0 failed=0
warn='-Wall -Wextra -Wshadow -Wpedantic -Werror'
printf '#define MIL_IMPLEMENTATION\n#include "test_selftest.c"\n' > "$dir/one.c"

# one NAME COMMAND...: builds $dir/one and runs it.
one() {
    name=$1
    shift
    rm -f "$dir/one"
    if "$@" -I"$top" -I"$top/tests" -D_POSIX_C_SOURCE=200809L $warn -o "$dir/one" "$dir/one.c" -lm -lpthread > "$dir/out.txt" 2>&1 && "$dir/one" >> "$dir/out.txt" 2>&1; then
        passed=$((passed + 1))
    else
        echo "FAIL $name: $*"
        grep -v '^ *kernels' "$dir/out.txt" | head -n 12
        failed=$((failed + 1))
    fi
}

for cc in gcc clang; do
    if ! $cc --version > /dev/null 2>&1; then
        echo "skip $cc: not installed"
        continue
    fi
    for opt in -O0 -O2 -O3 -Os '-O2 -march=native' '-O2 -ffast-math' '-O3 -march=native -ffast-math' '-O2 -fsigned-char' '-O2 -funsigned-char' '-O2 -fwrapv -fno-strict-aliasing'; do
        one "$cc C99 $opt" $cc -std=c99 $opt
    done
    for std in c11 c17; do one "$cc $std" $cc -std=$std -O1; done
    for std in c++11 c++17; do one "$cc $std" $cc -x c++ -std=$std -O1 -lstdc++; done
    one "$cc double" $cc -std=c99 -O2 -DMIL_REAL=double
    one "$cc C++11 double" $cc -x c++ -std=c++11 -O1 -DMIL_REAL=double -lstdc++
    if printf '#include <errno.h>\nint main(void) { return 0; }' | $cc -m32 -x c - -o "$dir/try" 2> /dev/null; then
        for opt in -O0 -O2 -Os; do one "$cc -m32 $opt" $cc -m32 -std=c99 $opt -msse2 -mfpmath=sse; done
        one "$cc -m32 x87" $cc -m32 -std=c99 -O2 -mno-sse -mfpmath=387 -DMIL_NO_SIMD
    else
        echo "skip $cc -m32: no headers or library for 32 bits"
    fi
    for macro in MIL_STATIC MIL_NO_STDIO MIL_NO_THREADS MIL_NO_SIMD MIL_NO_BF16 MIL_NO_TRAINING MIL_NO_METRICS 'MIL_ONLY_MODELS -DMIL_MODEL_ABMIL'; do
        one "$cc $macro" $cc -std=c99 -O1 -D$macro
    done
    one "$cc embedded set" $cc -std=c99 -Os -DMIL_NO_STDIO -DMIL_NO_THREADS -DMIL_NO_SIMD -DMIL_NO_BF16 -DMIL_NO_TRAINING -DMIL_NO_METRICS -DMIL_STATIC -DMIL_ONLY_MODELS -DMIL_MODEL_ABMIL
done
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed != 0 ]
