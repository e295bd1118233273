// build: float double
// The self-test and the version: on every CPU tier that this machine has, any number of threads, in a fixed block, and with
// each allocation failing. The program is also what runs on other CPUs and under other compilers.
#include <stdlib.h>
#include "mil.h"
#include "check.h"
#include "memory.h"

static memory mem;

TEST(the_version_is_that_of_the_header)
{
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", MIL_VERSION_MAJOR, MIL_VERSION_MINOR, MIL_VERSION_PATCH);
    CHECK_STRING(mil_version(), MIL_VERSION);
    CHECK_STRING(mil_version(), text);
}

TEST(every_cpu_tier_and_thread_count_passes_the_selftest)
{
    int tiers = 0;
    (void)memory_noise;
    CHECK(mil_selftest(NULL) == MIL_ERROR_ARGUMENT);
    for (int cpu = MIL_CPU_AUTO; cpu <= MIL_CPU_NEON; cpu++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            mil_context *ctx;
            mil_context_options o = mil_context_options_default();
            o.cpu = (mil_cpu)cpu;
            o.threads = threads;
            if (mil_context_create(&ctx, &o) != MIL_OK) continue;              // not on this machine
            tiers++;
            if (!CHECK(mil_selftest(ctx) == MIL_OK)) printf("  %s: %s\n", mil_context_cpu(ctx), mil_error(ctx));
            if (threads == 1) printf("  kernels %s: ok\n", mil_context_cpu(ctx));
            CHECK(mil_error(ctx)[0] == 0);
            mil_context_free(ctx);
        }
    }
    CHECK(tiers >= 4);                                     // auto and plain are everywhere
}

// Products of fewer bits are wider off than a full one, and are no wrong machine. Where there are none, it is the full test.
TEST(products_of_reduced_precision_pass_the_selftest)
{
    for (int threads = 1; threads <= 3; threads += 2) {
        mil_context *ctx;
        mil_context_options o = mil_context_options_default();
        o.precision = MIL_PRECISION_BF16;
        o.threads = threads;
        if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
        if (!CHECK(mil_selftest(ctx) == MIL_OK)) printf("  %s: %s\n", mil_context_cpu(ctx), mil_error(ctx));
        mil_context_free(ctx);
    }
}

TEST(the_selftest_leaves_nothing_behind_when_an_allocation_fails)
{
    mil_context *ctx = memory_context(&mem, 1, NULL);
    long calls = mem.calls;
    const size_t held = mem.bytes;
    CHECK(mil_selftest(ctx) == MIL_OK && mem.bytes == held);
    calls = mem.calls - calls;
    for (long n = 0; n < calls; n++) {
        mem.fail_at = mem.calls + n;
        const mil_status status = mil_selftest(ctx);
        mem.fail_at = -1;
        if (!CHECK((status == MIL_OK || status == MIL_ERROR_NO_MEMORY) && mem.bytes == held)) printf("  allocation %ld: %s\n", n, mil_error(ctx));
    }
    mil_context_free(ctx);
    CHECK(mem.bytes == 0);
}

TEST(the_selftest_runs_in_a_fixed_block)
{
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    o.memory_size = (size_t)(MIL_REAL_IS_FLOAT ? 1 : 2) << 20;
    o.memory = malloc(o.memory_size);
    o.threads = 1;
    if (CHECK(mil_context_create(&ctx, &o) == MIL_OK)) {
        if (!CHECK(mil_selftest(ctx) == MIL_OK)) printf("  %s\n", mil_error(ctx));
        printf("  self-test: %lu bytes at most\n", (unsigned long)mil_context_peak_bytes(ctx));
        mil_context_free(ctx);
    }
    free(o.memory);
}

// A kernel that is wrong is found: here by a host that drops the last task of each loop.
static void dropping(void *user, int64_t count, void (*task)(void *arg, int64_t index), void *arg)
{
    (void)user;
    for (int64_t i = 0; i < count - (count > 2); i++) task(arg, i);
}

TEST(a_wrong_machine_fails_the_selftest)
{
#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
    return;                                                // what is dropped here is what that sanitizer looks for
#endif
#endif
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    o.parallel.run = dropping;
    o.parallel.threads = 4;
    if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
    CHECK(mil_selftest(ctx) == MIL_ERROR_NUMERIC);
    CHECK_CONTAINS(mil_error(ctx), "self-test");
    mil_context_free(ctx);
}

TESTS(T(the_version_is_that_of_the_header) T(every_cpu_tier_and_thread_count_passes_the_selftest)
      T(products_of_reduced_precision_pass_the_selftest)
      T(the_selftest_leaves_nothing_behind_when_an_allocation_fails) T(the_selftest_runs_in_a_fixed_block)
      T(a_wrong_machine_fails_the_selftest))
