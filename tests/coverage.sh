#!/bin/sh
# coverage.sh DIR [GCOV]: what the runs under DIR (built with --coverage) reached of mil.h, over all objects together, by room; a
# line or branch counts as reached when any object ran it. Lines that none did go to DIR/missed.txt, branches to
# DIR/missed_branches.txt, each under its room and function. In readers, option parser and allocator paths every branch is to be
# reached, or to stand in tests/unreached.txt with a reason; what does not is printed and fails. Not counted: code of another machine (NEON), which is not compiled
# here, and branches of MIL_ASSERT, whose other way is an abort.
dir=$1 gcov=${2:-gcov}
top=$(cd "$(dirname "$0")/.." && pwd)
cd "$dir" || exit 1
rm -rf gcov missed.txt missed_branches.txt && touch missed.txt missed_branches.txt && mkdir gcov && cd gcov || exit 1
n=0
for data in ../*.gcda; do
    [ -f "$data" ] || continue
    n=$((n + 1))
    mkdir $n && ln -s "$top/mil.h" "$top/tests" $n/        # gcov looks for the source where it stands, and there as tests/../mil.h
    (cd $n && $gcov -b -c -o ../.. "../$data" > /dev/null 2>&1)
done
find . -name 'mil.h.gcov' > list.txt
if [ ! -s list.txt ]; then
    echo 'coverage: no data for mil.h; run make test CONFIG=coverage first'
    exit 1
fi
# First the rooms and functions from mil.h, then the counts: "  count:  line:source", count - (no code), ##### or ===== (not
# run); `branch K taken N` belongs to the line before it.
{ awk '/^\/\/ ==== >>/ { room = $3; gsub(/[>:]/, "", room) }
       /^(MILI_FN|MIL_DEF|static|MILI_LANES)[^;=]*\(/ { f = $0; sub(/\(.*/, "", f); sub(/.*[ *]/, "", f) }
       /^[^ #\/}]/ || /^\/\/ ==== >>/ { print "@ " NR " " room " " (f == "" ? "-" : f) }' "$top/mil.h"
  xargs cat < list.txt; } | awk '
    /^@ / { at[++places] = $2 + 0; room_at[places] = $3; function_at[places] = $4; next }
    /^branch/ {
        if (assertion) next
        key = line " " $2
        seen[key] = 1
        if ($0 ~ /taken [1-9]/) took[key] = 1
        next
    }
    /^ *[-#=0-9*]+: *[0-9]+:/ {
        split($0, part, ":")
        count = part[1]; gsub(/ /, "", count); line = part[2] + 0
        if (count == "-" || line == 0) next
        text[line] = substr($0, length(part[1]) + length(part[2]) + 3)
        assertion = text[line] ~ /MIL_ASSERT\(/
        code[line] = 1
        if (count ~ /^[0-9]/) ran[line] = 1
        if (line > last) last = line
    }
    END {
        place = 1
        for (l = 1; l <= last; l++) {
            while (place < places && at[place + 1] <= l) place++
            if (!code[l]) continue
            room = room_at[place]
            if (!(room in lines)) order[++rooms] = room
            lines[room]++; all++
            if (ran[l]) { hit[room]++; reached++ } else printf "%s %s %d:%s\n", room, function_at[place], l, text[l] > "../missed.txt"
            missing = 0
            for (k = 0; (l " " k) in seen; k++) {
                branches[room]++; all_branches++
                if ((l " " k) in took) { taken[room]++; all_taken++ } else missing++
            }
            if (missing && ran[l]) printf "%s %s %d: %d of %d: %s\n", room, function_at[place], l, missing, k, text[l] > "../missed_branches.txt"
        }
        printf "%-14s %8s %8s %8s   %8s %8s %8s\n", "room", "lines", "missed", "reached", "branches", "missed", "taken"
        for (r = 1; r <= rooms; r++) {
            room = order[r]
            printf "%-14s %8d %8d %7.2f%%   %8d %8d %7.2f%%\n", room, lines[room], lines[room] - hit[room], 100 * hit[room] / lines[room],
                branches[room], branches[room] - taken[room], branches[room] ? 100 * taken[room] / branches[room] : 100
        }
        printf "mil.h: %.2f %% of %d lines, %.2f %% of %d branches; what is missed: build/coverage/missed.txt, missed_branches.txt\n",
            100 * reached / all, all, all_branches ? 100 * all_taken / all_branches : 0, all_branches
    }'

# The rooms platform, json and file-code, and of model-code the option parser.
grep -h -E '^(platform|json|file-code) |^model-code mili_(option|parse|list|text|plain|in_range|choice)' ../missed.txt ../missed_branches.txt |
awk -v reasons="$top/tests/unreached.txt" '
    BEGIN {
        while ((getline line < reasons) > 0) if (line !~ /^#/ && split(line, part, / [|] /) == 3) { name[++count] = part[1]; piece[count] = part[2]; why[count] = part[3] }
        print "readers, option parser, allocator paths:"
    }
    {
        for (i = 1; i <= count; i++) if ($2 == name[i] && index($0, piece[i])) { explained++; printf "  %s: %s\n", name[i], why[i]; next }
        unexplained++
        printf "  NOT REACHED %s\n", substr($0, 1, 160)
    }
    END { printf "%d not reached with a reason, %d without\n", explained, unexplained; exit unexplained > 0 }'
