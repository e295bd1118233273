#!/bin/sh
# summary.sh LOG...: adds up what the logs of all runs say. A log ends with `N passed, N failed` and `exit STATUS`; one that
# does not (a crash, a sanitizer's report) counts as one more failure and is shown. Last line: the sum. Exit 1 on failures.
passed=0 failed=0
for log in "$@"; do
    name=$(basename "$log" .log)
    line=$(sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed.*/\1 \2/p' "$log" | tail -n 1)
    status=$(sed -n 's/^exit \([0-9][0-9]*\)$/\1/p' "$log" | tail -n 1)
    p=${line% *} f=${line#* }
    if [ -z "$line" ]; then p=0 f=1; fi
    if [ "${status:-1}" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    passed=$((passed + p)) failed=$((failed + f))
    if [ "$f" != 0 ]; then
        echo "---- $name (exit ${status:-?})"
        sed '/^exit [0-9]*$/d' "$log" | tail -n 60
    fi
    sed -n "s/^skip /skip $name: /p" "$log"
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" != 0 ]
