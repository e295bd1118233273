#!/bin/sh
# find_cc.sh COMPILER: the compiler's name as it is installed here, with a version behind it where only that is (Debian's versioned
# cross compilers stand beside gcc-multilib, the unversioned ones don't); the name as given when there is none.
if ! command -v "$1" > /dev/null; then
    IFS=:
    for folder in $PATH; do
        for path in "$folder/$1"-[0-9]*; do
            case ${path##*/} in *-posix|*-win32) continue ;; esac
            [ -x "$path" ] && echo "${path##*/}" && exit
        done
    done
fi
echo "$1"
