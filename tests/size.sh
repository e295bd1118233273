#!/bin/sh
# size.sh DIR: code size, stack and compile time against their budgets, with CC (gcc, for -fstack-usage). The last line is
# `N passed, N failed`. The tables go to DIR/stack.txt and to the output.
dir=$1
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && dir=$(cd "$dir" && pwd) && cd "$top" || exit 1
: "${CC:=gcc}"
passed=0 failed=0
check() {                                                  # check NAME VALUE BUDGET UNIT
    if [ "$2" -le "$3" ]; then passed=$((passed + 1)); verdict=ok; else failed=$((failed + 1)); verdict=FAIL; fi
    printf '%-4s %-52s %8s of %8s %s\n' $verdict "$1" "$2" "$3" "$4"
}

printf '#define MIL_IMPLEMENTATION\n#include "mil.h"\n' > "$dir/impl.c"

# ---- code: text of a program that opens weights from memory and scores, linked without what it does not use
cat > "$dir/score.c" <<'END'
#define MIL_IMPLEMENTATION
#include "mil.h"
static unsigned char block[1 << 20];
int main(int argc, char **argv)
{
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    float x[1024] = { 0 };
    mil_real y[2] = { 0, 0 };
    o.memory = block;
    o.memory_size = sizeof block;
    if (mil_context_create(&ctx, &o) != MIL_OK) return 1;
    mil_model *model = mil_open_memory(ctx, argv[0], (size_t)argc);
    mil_scorer *scorer = mil_scorer_create(model, NULL);
    mil_scorer_push(scorer, x, 1, 0, MIL_F32);
    mil_scorer_read(scorer, MIL_LOGITS, y, 2);
    mil_scorer_free(scorer);
    mil_model_free(model);
    mil_context_free(ctx);
    return y[0] > 0;
}
END
least='-DMIL_NO_STDIO -DMIL_NO_THREADS -DMIL_NO_BF16 -DMIL_NO_TRAINING -DMIL_NO_METRICS'
one='-DMIL_ONLY_MODELS -DMIL_MODEL_ABMIL'
os='-std=c99 -Os -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-pie -no-pie -I.'
text() { $CC $os "$@" 2> "$dir/out.txt" && size "$dir/size.out" | awk 'NR == 2 { print $1 }'; }
linked() { text "$@" "$dir/score.c" -Wl,--gc-sections -o "$dir/size.out" -lm -lpthread; }
whole() { text "$@" -c "$dir/impl.c" -o "$dir/size.out"; }
check 'scoring, abmil alone, embedded set' "$(linked $least $one -DMIL_STATIC)" 122880 'bytes of text'
check 'scoring, abmil alone, embedded set, no SIMD' "$(linked $least $one -DMIL_STATIC -DMIL_NO_SIMD)" 112640 'bytes of text'
check 'scoring, abmil alone, with files and threads' "$(linked -DMIL_NO_TRAINING -DMIL_NO_METRICS $one -DMIL_STATIC)" 131072 'bytes of text'
check 'scoring, every model, embedded set' "$(linked $least -DMIL_STATIC)" 225280 'bytes of text'
check 'the object: MIL_NO_TRAINING, MIL_NO_METRICS' "$(whole -DMIL_NO_TRAINING -DMIL_NO_METRICS)" 256000 'bytes of text'
check 'the object: everything' "$(whole)" 307200 'bytes of text'

# ---- compile time, at -O2: processor seconds
seconds=$( { TIMEFORMAT=%U; command -v bash > /dev/null && bash -c "TIMEFORMAT=%U; time $CC -std=c99 -O2 -I. -c '$dir/impl.c' -o '$dir/size.out'"; } 2>&1 | awk 'END { printf "%d", $1 + 0.999 }')
check 'compile time at -O2' "$seconds" "${COMPILE_SECONDS:-10}" 's'

# ---- stack: frames, from the compiler; no frame grows at run time
if $CC -std=c99 -O2 -I. -fstack-usage -c "$dir/impl.c" -o "$dir/stack.o" 2> "$dir/out.txt" && [ -f "$dir/stack.su" ]; then
    check 'frames whose size is not fixed (VLA, alloca)' "$(grep -c 'dynamic$' "$dir/stack.su")" 0 'functions'
    check 'largest frame' "$(awk -F'\t' '$2 > m { m = $2 } END { print m }' "$dir/stack.su")" 16384 'bytes'
    # The call graph from the object: deepest sum of frames below each public function, and any cycle. Calls through pointers
    # (kernels, models, the caller's callbacks) come on top: the deepest of any function is an upper bound for one level.
    sh tests/stack.sh "$dir/stack.o" "$dir/stack.su" > "$dir/stack.txt"
    check 'recursive functions' "$(sed -n 's/^recursive \([0-9]*\).*/\1/p' "$dir/stack.txt")" 0 'functions'
    check 'deepest stack of a kernel or any other function' "$(sed -n 's/^any \([0-9]*\).*/\1/p' "$dir/stack.txt")" 32768 'bytes'
    check 'deepest stack of a public call, direct calls' "$(sed -n 's/^deepest \([0-9]*\).*/\1/p' "$dir/stack.txt")" 65536 'bytes'
    echo '    the deepest:'
    sed -n 's/^call /        /p' "$dir/stack.txt" | head -n 12
fi
if grep -n -E '\balloca *\(' mil.h > "$dir/out.txt"; then cat "$dir/out.txt"; failed=$((failed + 1)); else passed=$((passed + 1)); fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
