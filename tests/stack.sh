#!/bin/sh
# stack.sh OBJECT USAGE: from an object's disassembly and gcc's .su file, the deepest stack below each function by direct calls
# (x86-64), and functions that call themselves on some path.
objdump -dr --no-show-raw-insn "$1" | awk -v usage="$2" '
    BEGIN {
        FS = "\t"
        while ((getline line < usage) > 0) {
            split(line, part, "\t")
            n = split(part[1], where, ":")
            frame[where[n]] = part[2] + 8
        }
        FS = " "
    }
    function base(name) { sub(/\.(constprop|isra|part|cold).*/, "", name); return name }
    /^[0-9a-f]+ <.*>:$/ { name = $2; gsub(/[<>:]/, "", name); sub(/\.cold.*/, "", name); here = name; known[here] = 1; next }
    /(call|jmp) .*<[a-zA-Z_0-9.]+>/ {
        match($0, /<[a-zA-Z_0-9.]+/)
        to = substr($0, RSTART + 1, RLENGTH - 1)
        sub(/\.cold.*/, "", to)                            # the unlikely part of a function belongs to it
        if (to != here || $0 ~ /call/) edge[here, ++count[here]] = to
        next
    }
    /R_X86_64_(PLT32|PC32)/ && here { to = $NF; sub(/[-+]0x[0-9a-f]+$/, "", to); if (to ~ /^mil/) edge[here, ++count[here]] = to }
    # Depth first without recursion: awk has it, but a cycle must be seen.
    function deep(f, i, d, best) {
        if (f in done) return done[f]
        if (f in open) { if (!(f in cycle)) { cycle[f] = 1; cycles++ } return 0 }
        open[f] = 1
        best = 0
        for (i = 1; i <= count[f]; i++) if (edge[f, i] in known) { d = deep(edge[f, i]); if (d > best) best = d }
        delete open[f]
        return done[f] = best + ((base(f) in frame) ? frame[base(f)] : (f in frame) ? frame[f] : 64)
    }
    END {
        for (f in known) { d = deep(f); if (d > any) { any = d; where_any = f } if (f ~ /^mil_/) { printf "call %7d %s\n", d, f | "sort -k2,2nr"; if (d > top) { top = d; where_top = f } } }
        close("sort -k2,2nr")
        printf "any %d %s\n", any, where_any
        printf "deepest %d %s\n", top, where_top
        printf "recursive %d", cycles
        for (f in cycle) printf " %s", f
        printf "\n"
    }'
