// build: float double private
// Every op: value against a plain reference, gradient against differences of the reference, on every CPU tier.
#define MIL_IMPLEMENTATION
#include "mil.h"
#include "op_cases.h"

static mil_context *context_of(mil_cpu cpu, int threads)
{
    mil_context *ctx = NULL;
    mil_context_options options = mil_context_options_default();
    options.cpu = cpu;
    options.threads = threads;
    mil_context_create(&ctx, &options);
    return ctx;
}

static const mil_tape_option poison[] = { MIL_TAPE_POISON }, apart[] = { MIL_TAPE_POISON, MIL_TAPE_NO_GROUPS }, unshared[] = { MIL_TAPE_NO_REUSE };

// Ops that stood on a tape of a case, by their place in mil_op_at.
static char seen[1024];

static void watch(mil_tape *tape)
{
    for (int64_t i = 0; i < tape->count; i++)
        for (int64_t k = 0; k < mil_op_count(); k++) seen[k] |= tape->node[i]->op == mil_op_at(k);
}

static void run_all(mil_cpu cpu, int threads, const mil_tape_option *options, int count)
{
    mil_context *ctx = context_of(cpu, threads);
    if (!ctx) return;                                      // a tier that this machine lacks
    op_cases_fill();
    op_case_watch = options == poison && cpu == MIL_CPU_AUTO ? watch : NULL;
    for (int i = 0; i < op_case_count; i++) op_case_check(ctx, &op_cases[i], mil_context_cpu(ctx), options, count);
    CHECK(mil_context_bytes(ctx) == 0 || threads > 1);
    mil_context_free(ctx);
}


TEST(every_case_by_row_groups_with_dead_memory_poisoned) { run_all(MIL_CPU_AUTO, 1, poison, 1); }
// After the test above, which sets `seen`.
TEST(every_op_of_the_list_has_a_case)
{
    // Those with more to say have a file of their own: test_ops_attention.c, test_ops_tokens.c; draws: test_tape.c.
    static const char *const elsewhere[] = { "attention", "attention_weights", "gradient of attention by q", "gradient of attention by k and v", "run_mean", "gradient of run_mean",
        "identity_minus", "conv", "gradient of conv by its weight", "topk", "argsort", "nearest", "gather_rows", "scatter_rows", "smooth_svm", "gradient of smooth_svm",
        "random", "permutation", "drop", "convert" };
    int any = 0;
    for (int64_t i = 0; i < mil_op_count(); i++) any |= seen[i];
    if (!any) return;                                      // that test was not asked for
    CHECK(mil_op_count() < (int64_t)sizeof seen);
    for (int64_t i = 0; i < mil_op_count(); i++) {
        const mil_op *op = mil_op_at(i);
        int covered = seen[i];
        for (size_t k = 0; k < sizeof elsewhere / sizeof *elsewhere; k++) covered |= strcmp(elsewhere[k], op->name) == 0;
        if (!covered) printf("op %s has no case\n", op->name);
        CHECK(covered);
        CHECK(mil_op_find(op->name) == op);
    }
    CHECK(mil_op_at(-1) == NULL && mil_op_at(mil_op_count()) == NULL && mil_op_find("no such op") == NULL && mil_op_find(NULL) == NULL);
}

TEST(every_case_on_results_of_reductions)
{
    op_case_reduced = 1;
    run_all(MIL_CPU_AUTO, 2, poison, 1);
    op_case_reduced = 0;
}
TEST(every_case_node_by_node) { run_all(MIL_CPU_AUTO, 2, apart, 2); }
TEST(every_case_without_sharing_memory) { run_all(MIL_CPU_AUTO, 1, unshared, 1); }
TEST(every_case_by_plain_kernels) { run_all(MIL_CPU_PLAIN, 1, poison, 1); }
TEST(every_case_by_avx2_kernels) { run_all(MIL_CPU_AVX2, 1, poison, 1); }

TESTS(T(every_case_by_row_groups_with_dead_memory_poisoned) T(every_op_of_the_list_has_a_case) T(every_case_on_results_of_reductions)
      T(every_case_node_by_node) T(every_case_without_sharing_memory)
      T(every_case_by_plain_kernels) T(every_case_by_avx2_kernels))
