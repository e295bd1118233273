#!/bin/sh
# check_symbols.sh OBJECT [static|nostdio]: what an object with the implementation in it (compiled with -fno-pic, so that
# constant tables of pointers are read-only) shows to the linker. A line for each fault; exit 1 when there is one.
#   defined   only mil_ names; with `static` none at all
#   undefined only names of libc, libm and pthread, and none that prints, aborts, exits or keeps hidden state; with
#             `nostdio` none that touches files
#   data      nothing writable
object=$1 mode=${2:-}
faults=0
say() { echo "    $*"; faults=1; }

names=$(nm "$object" | awk 'NF == 3 { print $2, $3 } NF == 2 { print $1, $2 }' | sed 's/ _mil_/ mil_/')
for name in $(echo "$names" | awk '$1 ~ /^[TDBRCGSVWi]$/ { print $2 }'); do
    case $name in
    mil_*) [ "$mode" = static ] && say "static build, but $name is visible" ;;
    *) say "defined without the prefix mil_: $name" ;;
    esac
done
for name in $(echo "$names" | awk '$1 ~ /^[dDbBCsSgG]$/ { print $2 }'); do say "writable data: $name"; done

# What may be called. Anything new stands out here before it reaches a user.
allowed=' malloc calloc realloc free memcpy memmove memset memcmp memchr strlen strcmp strncmp strspn strcspn strchr strrchr strstr strtod
 strtol strtoll strtoul strtoull strerror __errno_location __strtod_internal qsort
 snprintf vsnprintf sscanf __isoc99_sscanf __isoc23_sscanf __isoc23_strtol __isoc23_strtoll __isoc23_strtoul __isoc23_strtoull
 exp expf exp2 exp2f expm1 expm1f log logf log2 log2f log10 log10f log1p log1pf pow powf sqrt sqrtf cbrt cbrtf tanh tanhf
 sinh sinhf cosh coshf sin sinf cos cosf sincos sincosf tan tanf atan atanf atan2 atan2f acos acosf asin asinf erf erff erfc
 erfcf lgamma lgammaf tgamma ceil ceilf floor floorf round roundf rint rintf nearbyint nearbyintf trunc truncf fmod fmodf
 fabs fabsf fmax fmaxf fmin fminf ldexp ldexpf frexp frexpf lrint lrintf lround llround hypot hypotf scalbn scalbnf
 clock_gettime sysconf getauxval _GLOBAL_OFFSET_TABLE_ __stack_chk_fail __udivti3 __divti3 __umodti3 __popcountdi2 '
files=' fopen fclose fread fwrite fseek fseeko ftell ftello fflush fileno fchmod fsync ferror feof fgets fprintf fputs rename remove
 open close read write fstat stat lstat mmap munmap madvise unlink link symlink readlink ftruncate lseek pread pwrite dup
 opendir readdir closedir mkdir mkstemp getpid fstat64 stat64 open64 fopen64 lseek64 mmap64 posix_fadvise fdopen fcntl '
for name in $(nm -u "$object" | awk '{ print $NF }'); do
    case $name in pthread_*|mil_*) continue ;; esac
    case "$allowed" in *[[:space:]]"$name"[[:space:]]*) continue ;; esac
    case "$files" in *[[:space:]]"$name"[[:space:]]*)
        [ "$mode" = nostdio ] && say "MIL_NO_STDIO, but it uses $name"
        continue ;;
    esac
    say "uses $name"
done
exit $faults
