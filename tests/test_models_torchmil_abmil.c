// build: float double
// torchmil's abmil: every parity case, and every parameter by finite differences.
#include "mil.h"
#include "check.h"
#include "replay.h"

static void run_case(const char *name)
{
    char path[256];
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    replay r;
    o.threads = 1;
    if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
    for (int differences = 0; differences <= !MIL_REAL_IS_FLOAT; differences++) {
        snprintf(path, sizeof path, "tests/cases/torchmil-abmil-%s.safetensors", name);
        if (replay_open(&r, ctx, path)) {
            r.training = r.training || differences;
            if (!differences) replay_run(&r);
            else if (r.has_target) replay_differences(&r);
        }
        CHECK_STRING(r.why, "");
        if (check_failures) printf("%s: err %.3g (%s)\n", name, r.err, r.worst);
        replay_free(&r);
    }
    CHECK(mil_context_bytes(ctx) == 0);
    mil_context_free(ctx);
}

// X(name of the test, name of the case)
#define CASES(X)                                                                                              \
    X(eval, "eval") X(train, "train") X(featext_gated_eval, "featext-gated-eval")                             \
    X(gated_gelu_train, "gated-gelu-train") X(one_instance_eval, "one-instance-eval")                         \
    X(relu_mask_batch_train, "relu-mask-batch-train")

#define CASE_TEST(test, name) TEST(test) { run_case(name); }
CASES(CASE_TEST)

#define CASE_ROW(test, name) T(test)
TESTS(CASES(CASE_ROW))
