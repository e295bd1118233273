#!/bin/sh
# check_build.sh DIR: mil.h as users take it in. Each line of output is one build; the last `N passed, N failed`.
# CC and CXX say with what; DIR is where the small programs are written and built.
dir=$1
top=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$dir" && cd "$dir" || exit 1
: "${CC:=cc}" "${CXX:=c++}"
passed=0 failed=0

# one NAME COMMAND...: what the command says is shown when it fails.
one() {
    name=$1
    shift
    if "$@" > out.txt 2>&1; then
        passed=$((passed + 1))
    else
        echo "FAIL $name: $*"
        head -n 15 out.txt
        failed=$((failed + 1))
    fi
}

warn='-Wall -Wextra -Wshadow -Wpedantic -Werror'
c="$CC -std=c99 -O0 -I$top $warn"

cat > use.h <<END
#include <string.h>
static int use(void)
{
    mil_context *ctx = NULL;
    if (strcmp(mil_version(), MIL_VERSION) != 0 || mil_context_create(&ctx, NULL) != MIL_OK) return 1;
    mil_model *model = mil_create(ctx, "abmil", "num_classes=2");
    const int bad = !model || mil_model_parameter_count(model) != 920195;
    mil_model_free(model);
    mil_context_free(ctx);
    return bad;
}
END
printf '#define MIL_IMPLEMENTATION\n#include "mil.h"\n' > impl.c
# The first programs that a reader meets: the README's, and the header's quick start as a function's body.
sed -n '/^#include <stdio.h>/,/^```/p' "$top/README.md" | sed '/^```/,$d' > readme.c
{
    printf '#define MIL_IMPLEMENTATION\n#include "mil.h"\n#include <stdio.h>\nint score(const float *features, int64_t n);\n'
    printf 'int score(const float *features, int64_t n)\n{\n'
    sed -n '/^\/\/ Score a slide:/,/^\/\/ What it does not do/s/^\/\/     //p' "$top/mil.h"
    printf '}\nint main(void) { return score(NULL, 0) == 1 ? 0 : 1; }\n'
} > quick.c
printf '#define MIL_IMPLEMENTATION\n#include "mil.h"\n#include "use.h"\nint main(void) { return use(); }\n' > app.c
printf '#include "mil.h"\n#include "mil.h"\n#define MIL_IMPLEMENTATION\n#include "mil.h"\n#include "mil.h"\n#include "use.h"\nint main(void) { return use(); }\n' > twice.c
printf '#include "mil.h"\n#include "mil.h"\n#include "use.h"\nint main(void) { return use(); }\n' > again.c
printf '#include "mil.h"\n#include "use.h"\nint other(void);\nint other(void) { return use(); }\n' > other.c
printf '#define MIL_IMPLEMENTATION\n#include "mil.h"\n#include "use.h"\nint other(void);\nint main(void) { return use() + other(); }\n' > two.c
printf '#define MIL_STATIC\n#include "mil.h"\n#include "use.h"\nint other(void);\nint other(void) { return use(); }\n' > static_other.c
printf '#define MIL_STATIC\n#define MIL_IMPLEMENTATION\n#include "mil.h"\n#include "use.h"\nint other(void);\nint main(void) { return use() + other(); }\n' > static_two.c
printf '#include "mil.h"\n#include "use.h"\nint main() { return use(); }\n' > app.cc

one 'cc app.c -lm -lpthread' sh -c "$CC -I$top app.c -lm -lpthread -o app && ./app"
one 'the first program of the README' sh -c "$c readme.c -lm -lpthread -o readme && ./readme | grep weights.safetensors"
one 'the first program of the header' sh -c "$c quick.c -lm -lpthread -o quick && ./quick | grep weights.safetensors"
one 'included twice' sh -c "$c twice.c -lm -lpthread -o twice && ./twice"
one 'MIL_IMPLEMENTATION on the command line' sh -c "$c -DMIL_IMPLEMENTATION again.c -lm -lpthread -o again && ./again"
one 'included in two files' sh -c "$c two.c other.c -lm -lpthread -o two && ./two"
one 'static in two files' sh -c "$c static_two.c static_other.c -lm -lpthread -o static_two && ./static_two"
one 'double' sh -c "$c -DMIL_REAL=double app.c -lm -lpthread -o app_double && ./app_double"
one 'float and double do not link together' sh -c "$c -DMIL_REAL=double -c other.c -o other_double.o && ! $c two.c other_double.o -lm -lpthread -o mixed"
one 'static, whole object' $c -fno-pic -DMIL_STATIC -c impl.c -o impl_static.o
one 'static: no visible symbol' sh "$top/tests/check_symbols.sh" impl_static.o static
one 'no private macro is left' sh -c "! $c -dM -E impl.c | grep -E '^#define (MILI_|mili_)'"
one 'object' $c -fno-pic -c impl.c -o impl.o
one 'symbols' sh "$top/tests/check_symbols.sh" impl.o

for macro in MIL_NO_STDIO MIL_NO_THREADS MIL_NO_SIMD MIL_NO_BF16 MIL_NO_TRAINING MIL_NO_METRICS; do
    one "$macro" sh -c "$c -D$macro app.c -lm -lpthread -o app_$macro && ./app_$macro"
    one "$macro, static" $c -D$macro -DMIL_STATIC -fsyntax-only impl.c
done
one 'MIL_NO_THREADS links without pthread' sh -c "$c -DMIL_NO_THREADS app.c -lm -o app_alone && ./app_alone"
one 'all MIL_NO_* together' sh -c "$c -DMIL_NO_STDIO -DMIL_NO_THREADS -DMIL_NO_SIMD -DMIL_NO_BF16 -DMIL_NO_TRAINING -DMIL_NO_METRICS app.c -lm -o app_least && ./app_least"
one 'MIL_NO_STDIO object' $c -fno-pic -DMIL_NO_STDIO -c impl.c -o impl_nostdio.o
one 'MIL_NO_STDIO: no file function' sh "$top/tests/check_symbols.sh" impl_nostdio.o nostdio

cat > own.c <<END
#include <stdlib.h>
static void *own_malloc(size_t n) { return malloc(n); }
static void *own_realloc(void *p, size_t n) { return realloc(p, n); }
static void own_free(void *p) { free(p); }
#define MIL_MALLOC(n) own_malloc(n)
#define MIL_REALLOC(p, n) own_realloc(p, n)
#define MIL_FREE(p) own_free(p)
#define MIL_IMPLEMENTATION
#include "mil.h"
#include "use.h"
int main(void) { (void)own_malloc; (void)own_realloc; (void)own_free; return use(); }
END
one 'MIL_MALLOC, MIL_REALLOC, MIL_FREE' sh -c "$c own.c -lm -lpthread -o own && ./own"
one 'MIL_MALLOC alone is refused' sh -c "! $c '-DMIL_MALLOC(n)=malloc(n)' -fsyntax-only impl.c"

if printf '#include <cblas.h>\n' | $CC -x c -fsyntax-only - 2>/dev/null; then
    one 'MIL_USE_CBLAS' $c -DMIL_USE_CBLAS -fsyntax-only impl.c
else
    mkdir -p cblas                                       # the declarations alone, so that the call sites compile
    cat > cblas/cblas.h <<END
enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112, CblasConjTrans = 113 };
void cblas_sgemm(enum CBLAS_ORDER o, enum CBLAS_TRANSPOSE a, enum CBLAS_TRANSPOSE b, int m, int n, int k, float alpha,
                 const float *A, int lda, const float *B, int ldb, float beta, float *C, int ldc);
void cblas_dgemm(enum CBLAS_ORDER o, enum CBLAS_TRANSPOSE a, enum CBLAS_TRANSPOSE b, int m, int n, int k, double alpha,
                 const double *A, int lda, const double *B, int ldb, double beta, double *C, int ldc);
END
    one 'MIL_USE_CBLAS' $c -DMIL_USE_CBLAS -Icblas -fsyntax-only impl.c
    one 'MIL_USE_CBLAS, double' $c -DMIL_USE_CBLAS -DMIL_REAL=double -Icblas -fsyntax-only impl.c
fi

if $CXX --version > /dev/null 2>&1; then
    cxx="$CXX -O0 -I$top $warn"
    one 'C++11 with the implementation' sh -c "$cxx -std=c++11 -x c++ app.c -lm -lpthread -o app_cxx && ./app_cxx"
    one 'C++11 against a C object' sh -c "$cxx -std=c++11 app.cc impl.o -no-pie -lm -lpthread -o app_mixed && ./app_mixed"
    one 'C++11, static' $cxx -std=c++11 -x c++ -DMIL_STATIC -fsyntax-only impl.c
    one 'C++11, double' $cxx -std=c++11 -x c++ -DMIL_REAL=double -fsyntax-only impl.c
else
    echo "skip C++: no $CXX"
fi

one 'no allocator, threads, files: fixed_memory.c' sh -c "$c '$top/examples/fixed_memory.c' -lm -o fixed && ./fixed > fixed.txt && ! nm -u fixed | grep -E ' (malloc|realloc|free|calloc|fopen|open|pthread_create)'"

one 'make install' sh -c "cd '$top' && make install DESTDIR='$(pwd)/stage' PREFIX=/opt/mil"
one 'installed files' sh -c "test -f stage/opt/mil/include/mil.h && grep -q '^Version: [0-9]' stage/opt/mil/lib/pkgconfig/mil.pc &&
    grep -q '^prefix=/opt/mil' stage/opt/mil/lib/pkgconfig/mil.pc"
one 'make uninstall' sh -c "cd '$top' && make uninstall DESTDIR='$(pwd)/stage' PREFIX=/opt/mil"
one 'nothing stays installed' sh -c 'test -z "$(find stage -type f)"'

echo "$passed passed, $failed failed"
[ $failed = 0 ]
