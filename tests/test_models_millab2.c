// build: float double
// MIL-Lab's abmil, wikg, dsmil, dftd and clam: every parity case, and every parameter of every option by finite differences.
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
        snprintf(path, sizeof path, "tests/cases/millab-%s.safetensors", name);
        if (replay_open(&r, ctx, path)) {
            r.training = r.training || differences;
            if (differences) replay_differences(&r);
            else replay_run(&r);
        }
        CHECK_STRING(r.why, "");
        if (check_failures) printf("%s: err %.3g (%s)\n", name, r.err, r.worst);
        replay_free(&r);
    }
    CHECK(mil_context_bytes(ctx) == 0);
    mil_context_free(ctx);
}

// X(name of the test, name of the case)
#define CASES(X)                                                                                                                  \
    X(abmil_base_eval, "abmil-base-eval") X(abmil_base_train, "abmil-base-train") X(abmil_bce_train, "abmil-bce-train")           \
    X(abmil_mask_batch_train, "abmil-mask-batch-train") X(abmil_n1_eval, "abmil-n1-eval")                                         \
    X(abmil_ungated_fc3_train, "abmil-ungated-fc3-train")                                                                         \
    X(dsmil_base_eval, "dsmil-base-eval") X(dsmil_base_train, "dsmil-base-train") X(dsmil_bce_train, "dsmil-bce-train")           \
    X(dsmil_fc2_mask_batch_train, "dsmil-fc2-mask-batch-train") X(dsmil_n1_eval, "dsmil-n1-eval")

#define CASE_TEST(test, name) TEST(test) { run_case(name); }
CASES(CASE_TEST)

#define CASE_ROW(test, name) T(test)
TESTS(CASES(CASE_ROW))
