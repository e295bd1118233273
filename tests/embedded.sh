#!/bin/sh
# embedded.sh DIR: the embedded set (no stdio, threads, training, metrics, allocator; one model) for bare metal, and a program in
# a fixed block that must give the host's logits within 1e-5 of their size. Also a build for Windows. The last line is
# `N passed, N failed`; what is not installed is skipped.
dir=$1
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && dir=$(cd "$dir" && pwd) && cd "$top" || exit 1
passed=0 failed=0
pass() { passed=$((passed + 1)); echo "ok $*"; }
fail() { failed=$((failed + 1)); echo "FAIL $*"; head -n 12 "$dir/out.txt"; }

have() { command -v "$1" > /dev/null || { echo "skip $1: not installed"; return 1; }; }

# near NAME FILE: the logits in FILE against those of the host
near() {
    if awk 'FNR == 1 { if (NR == 1) { a = $2; b = $3 } else { da = $2 - a; db = $3 - b; s = (a < 0 ? -a : a) + (b < 0 ? -b : b)
            ok = $1 == "logits" && (da < 0 ? -da : da) <= 1e-5 * s && (db < 0 ? -db : db) <= 1e-5 * s } } END { exit !ok }' "$dir/host.txt" "$2"; then
        pass "$1: $(cat "$2")"
    else
        cp "$2" "$dir/out.txt"
        fail "$1: not the host's $(cat "$dir/host.txt")"
    fi
}

: "${CC:=cc}"
if $CC -std=c99 -Os -I. -Wall -Wextra -Werror -o "$dir/host" tests/embedded.c -lm > "$dir/out.txt" 2>&1 && "$dir/host" > "$dir/host.txt"; then
    pass "host: $(cat "$dir/host.txt")"
else
    fail 'host'
    exit 1
fi

# An object for bare metal: only the C library's memory and text functions and libm's may be missing from it.
object() {
    name=$1
    shift
    if ! "$@" -std=c99 -Os -ffreestanding -DEMBEDDED_NO_MAIN -I. -Wall -Wextra -Werror -c -o "$dir/bare.o" tests/embedded.c > "$dir/out.txt" 2>&1; then
        fail "$name"
        return
    fi
    nm -u "$dir/bare.o" | awk '{ print $NF }' | grep -v -E '^(__aeabi_.*|mem(cpy|set|move|cmp|chr)|str(len|cmp|ncmp|chr|rchr|str|cspn|spn|cpy)|v?snprintf|(exp|log|log1p|tanh|erf|erfc|sqrt|sin|cos|tan|pow|floor|ceil|ldexp|frexp|fmod)f?|f(abs|ma|min|max)f?|__errno|__[a-z]*[sdt]i[0-9]|__stack_chk_.*|_GLOBAL_OFFSET_TABLE_)$' > "$dir/out.txt"
    if [ -s "$dir/out.txt" ]; then fail "$name needs more than memory, text and maths:"; else pass "$name: $(size "$dir/bare.o" 2> /dev/null | awk 'NR == 2 { print $1 " bytes of code" }')"; fi
}

if have arm-none-eabi-gcc; then
    object 'Cortex-M7' arm-none-eabi-gcc -mcpu=cortex-m7 -mthumb -mfloat-abi=hard -mfpu=fpv5-d16
    object 'Cortex-M4' arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16
    object 'Cortex-R5' arm-none-eabi-gcc -mcpu=cortex-r5 -mfloat-abi=soft
    if arm-none-eabi-gcc -std=c99 -Os -mcpu=cortex-a9 -mfloat-abi=hard -mfpu=vfpv3-d16 --specs=rdimon.specs -Wl,-Ttext=0x100000 -I. -o "$dir/bare" tests/embedded.c -lm > "$dir/out.txt" 2>&1; then
        if have qemu-arm; then
            qemu-arm "$dir/bare" > "$dir/bare.txt" 2> "$dir/out.txt"
            near 'arm-none-eabi, newlib, under qemu-arm' "$dir/bare.txt"
        fi
    else
        fail 'arm-none-eabi program'
    fi
fi
arm64=$(sh tests/find_cc.sh aarch64-linux-gnu-gcc)
if have $arm64; then
    object 'aarch64 bare metal' $arm64 -mcpu=cortex-a53 -mno-outline-atomics -fno-stack-protector
    if $arm64 -std=c99 -Os -static -I. -o "$dir/arm64" tests/embedded.c -lm > "$dir/out.txt" 2>&1; then
        if have qemu-aarch64; then
            qemu-aarch64 "$dir/arm64" > "$dir/arm64.txt" 2> "$dir/out.txt"
            near 'aarch64 (NEON) under qemu' "$dir/arm64.txt"
        fi
    else
        fail 'aarch64 program'
    fi
fi
for cc in x86_64-w64-mingw32-gcc i686-w64-mingw32-gcc; do
    have $cc || continue
    if $cc -std=c99 -O1 -I. -Itests -Wall -Wextra -Wno-format -o "$dir/selftest.exe" -include mil.h -DMIL_IMPLEMENTATION tests/test_selftest.c -lm > "$dir/out.txt" 2>&1; then
        pass "$cc builds the whole header"
        wine=$(command -v wine || command -v wine64 || ls /usr/lib/wine/wine64 2> /dev/null)
        if [ -n "$wine" ] && { [ $cc = x86_64-w64-mingw32-gcc ] || [ -e "${wine%64}" ]; }; then
            if WINEDEBUG=-all WINEPREFIX="$dir/wine" "$wine" "$dir/selftest.exe" > "$dir/out.txt" 2>&1; then pass "$cc under wine"; else fail "$cc under wine"; fi
        else
            echo "skip $cc: no wine for it"
        fi
    else
        fail "$cc"
    fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
