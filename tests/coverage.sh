#!/bin/sh
# coverage.sh DIR [GCOV]: what the runs under DIR (built with --coverage) reached of mil.h, over all objects together; a line
# counts as reached when any object ran it. The lines that none did go to DIR/missed.txt.
dir=$1 gcov=${2:-gcov}
top=$(cd "$(dirname "$0")/.." && pwd)
cd "$dir" || exit 1
rm -rf gcov && mkdir gcov && cd gcov || exit 1
n=0
for data in ../*.gcda; do
    [ -f "$data" ] || continue
    n=$((n + 1))
    mkdir $n && ln -s "$top/mil.h" $n/mil.h              # gcov looks for the source where it stands
    (cd $n && $gcov -b -c -o ../.. "../$data" > /dev/null 2>&1)
done
find . -name 'mil.h.gcov' > list.txt
if [ ! -s list.txt ]; then
    echo 'coverage: no data for mil.h; run make test CONFIG=coverage first'
    exit 1
fi
# "  count:  line:source", count - (no code), ##### or ===== (not run); `branch K taken N` belongs to the line before it.
xargs cat < list.txt | awk -F: '
    /^branch/ {
        split($0, part, " ")
        key = line " " part[2]
        seen[key] = 1
        if ($0 ~ /taken [1-9]/) took[key] = 1
        next
    }
    /^ *[-#=0-9*]+: *[0-9]+:/ {
        count = $1; gsub(/ /, "", count); line = $2 + 0
        if (count == "-" || line == 0) next
        text[line] = substr($0, index($0, $3))
        code[line] = 1
        if (count ~ /^[0-9]/) ran[line] = 1
        if (line > last) last = line
    }
    END {
        for (l = 1; l <= last; l++) if (code[l]) {
            all++
            if (ran[l]) reached++; else printf "%d:%s\n", l, text[l] > "../missed.txt"
        }
        for (k in seen) { branches++; if (k in took) taken++ }
        printf "mil.h: %.2f %% of %d lines, %.2f %% of %d branches; missed lines in build/coverage/missed.txt\n",
            100 * reached / all, all, branches ? 100 * taken / branches : 0, branches
    }'
