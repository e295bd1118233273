#!/bin/sh
# run_examples.sh BIN: runs BIN/NAME for every examples/NAME.c and compares what it prints with the block that begins at
# `// Expected output:` in the head comment and ends with the comment. Texts must be equal, white space apart; numbers
# within 1e-3 relative (absolute below 1), or within what the heading says: `// Expected output (within 0.05):`.
# Each example runs in an empty folder of its own, where it may write. Last line: N passed, N failed.
top=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$1" && pwd) || exit 1
passed=0 failed=0

for source in "$top"/examples/*.c; do
    name=$(basename "$source" .c)
    room="$bin/run_$name"
    rm -rf "$room" && mkdir -p "$room"
    awk '/^\/\/ Expected output/ { on = 1; next } on && !/^\/\// { exit } on { sub(/^\/\/ ?/, ""); print }' "$source" > "$room.want"
    tol=$(sed -n 's/^\/\/ Expected output (within \([0-9.e-]*\)).*/\1/p' "$source" | head -n 1)
    if [ ! -s "$room.want" ]; then
        echo "FAIL $name: no '// Expected output:' block in its head comment"
        failed=$((failed + 1))
        continue
    fi
    (cd "$room" && MIL_ROOT="$top" "$bin/$name") > "$room.got" 2> "$room.err"
    status=$?
    if [ $status = 0 ] && awk -v tol="${tol:-1e-3}" -v want="$room.want" '
        # splits a line into its numbers, num[1..n], and the text around them, returned with # in each number'"'"'s place
        function take(line, num,    text, n) {
            gsub(/[ \t\r]+/, " ", line); sub(/^ /, "", line); sub(/ $/, "", line)
            text = ""; n = 0
            while (match(line, /-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?/)) {
                num[++n] = substr(line, RSTART, RLENGTH) + 0
                text = text substr(line, 1, RSTART - 1) "#"
                line = substr(line, RSTART + RLENGTH)
            }
            num[0] = n
            return text line
        }
        function bad(why) { print "    line " NR ": " why; wrong = 1; exit }
        function expected(    line) {
            while ((getline line < want) > 0) if (line !~ /^[ \t]*$/) return line
            return "\001"
        }
        /^[ \t\r]*$/ { next }
        {
            w = expected()
            if (w == "\001") bad("printed but not expected: " $0)
            if (take($0, a) != take(w, b)) bad("printed [" $0 "], expected [" w "]")
            for (i = 1; i <= b[0]; i++) {
                d = a[i] - b[i]; if (d < 0) d = -d
                s = b[i] < 0 ? -b[i] : b[i]; if (s < 1) s = 1
                if (!(d <= tol * s)) bad("printed [" $0 "], expected [" w "]: " a[i] " is not " b[i])
            }
        }
        END { if (!wrong) { w = expected(); if (w != "\001") { print "    missing: " w; wrong = 1 } } exit wrong }
    ' "$room.got" > "$room.diff"; then
        passed=$((passed + 1))
    else
        echo "FAIL $name (exit $status)"
        cat "$room.err"
        [ ! -f "$room.diff" ] || cat "$room.diff"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
