#!/bin/sh
# undefs.sh: writes the list at the end of mil.h that takes away every private macro. Run it when one was added.
cd "$(dirname "$0")/.." || exit 1
sed -n 's/^ *# *define *\(MILI_[A-Za-z0-9_]*\).*/\1/p; s/^ *# *define *\(mili_[a-z0-9_]*\).*/\1/p' mil.h | LC_ALL=C sort -u > build/undefs.txt
awk 'FILENAME != "mil.h" { names = names "#undef " $0 "\n"; next }
     /^#ifndef MIL_KEEP_PRIVATE_MACROS/ { print; printf "%s", names; skip = 1; next }
     skip && /^#undef / { next }
     { skip = 0; print }' build/undefs.txt mil.h > build/undefs.h && cat build/undefs.h > mil.h
