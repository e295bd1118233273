// The test harness: a test is a function whose name says the behaviour it checks, a file of tests one binary.
//
//     #include "check.h"
//     TEST(softmax_of_equal_scores_is_uniform) { ... CHECK(status == MIL_OK); CHECK_NEAR(y[0], 0.25, 1e-6); }
//     TESTS(T(softmax_of_equal_scores_is_uniform))        // last line of the file: every test once more, then main
//
//     ./test_x              runs all        ./test_x NAME...  only tests whose name contains one of the words
//     ./test_x --list       prints the names
//
// A failing check prints file:line and goes on; the last line is `N passed, N failed`, counted in tests. A TEST that is
// missing from TESTS is an unused static function, which the compiler reports. C99 and C++11.
#ifndef CHECK_H
#define CHECK_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Whether the environment asks for the smaller sizes only (MIL_TEST_SMALL: emulated CPUs), and how many rounds of a random test.
static inline int check_small(void) { return getenv("MIL_TEST_SMALL") != NULL; }
static inline int check_rounds(int rounds)
{
    const char *text = getenv("MIL_TEST_ROUNDS");
    return text ? atoi(text) : check_small() ? (rounds + 9) / 10 : rounds;
}

static int check_failures;                                 // in the test that is running
static const char *check_name = "";

static void check_report(const char *file, int line, const char *text)
{
    if (++check_failures <= 20) printf("%s:%d: %s: %s\n", file, line, check_name, text);
    else if (check_failures == 21) printf("%s: more failures of %s are not shown\n", file, check_name);
}

// Yields whether the condition holds, so that a test can stop where going on makes no sense.
static int check_true(int holds, const char *file, int line, const char *text)
{
    if (!holds) check_report(file, line, text);
    return holds;
}

// |x - reference| <= tol * max(1, |reference|); NaN fails. Equal infinities pass.
static int check_near(double x, double reference, double tol, const char *file, int line, const char *text)
{
    const double size = fabs(reference) > 1 ? fabs(reference) : 1, err = x == reference ? 0 : fabs(x - reference) / size;
    char sentence[512];
    if (err <= tol) return 1;
    snprintf(sentence, sizeof sentence, "%.200s is %.12g, not %.12g (err %.3g > %.3g)", text, x, reference, err, tol);
    check_report(file, line, sentence);
    return 0;
}

static int check_string(const char *x, const char *reference, const char *file, int line, const char *text)
{
    char sentence[1024];
    if (x && reference && strcmp(x, reference) == 0) return 1;
    snprintf(sentence, sizeof sentence, "%.200s is \"%.300s\", not \"%.300s\"", text, x ? x : "(null)",
             reference ? reference : "(null)");
    check_report(file, line, sentence);
    return 0;
}

static int check_contains(const char *x, const char *part, const char *file, int line, const char *text)
{
    char sentence[1024];
    if (x && strstr(x, part)) return 1;
    snprintf(sentence, sizeof sentence, "%.200s is \"%.300s\", without \"%.300s\"", text, x ? x : "(null)", part);
    check_report(file, line, sentence);
    return 0;
}

#define CHECK(cond)                   check_true((cond) ? 1 : 0, __FILE__, __LINE__, #cond)
#define CHECK_NEAR(x, reference, tol) check_near((double)(x), (double)(reference), (double)(tol), __FILE__, __LINE__, #x)
#define CHECK_STRING(x, reference)    check_string((x), (reference), __FILE__, __LINE__, #x)
#define CHECK_CONTAINS(x, part)       check_contains((x), (part), __FILE__, __LINE__, #x)

typedef struct { const char *name; void (*run)(void); } check_test;

#define TEST(name) static void name(void)
#define T(name)    { #name, name },
#define TESTS(list)                                                               \
    int main(int argc, char **argv)                                               \
    {                                                                             \
        static const check_test tests[] = { list };                               \
        return check_main(tests, (int)(sizeof tests / sizeof *tests), argc, argv); \
    }

static int check_main(const check_test *tests, int count, int argc, char **argv)
{
    int passed = 0, failed = 0;
    (void)check_string, (void)check_near, (void)check_contains, (void)check_true;   // used or not
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);                 // what was said before a crash is not lost
    for (int i = 0; i < count; i++) {
        int wanted = argc < 2;
        for (int k = 1; k < argc; k++) wanted |= strstr(tests[i].name, argv[k]) != NULL;
        if (argc == 2 && strcmp(argv[1], "--list") == 0) {
            puts(tests[i].name);
            continue;
        }
        if (!wanted) continue;
        check_failures = 0;
        check_name = tests[i].name;
        tests[i].run();
        if (check_failures) printf("FAIL %s\n", tests[i].name);
        *(check_failures ? &failed : &passed) += 1;
    }
    if (argc == 2 && strcmp(argv[1], "--list") == 0) return 0;
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}

#endif
