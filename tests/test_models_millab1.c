// build: float double
// MIL-Lab's transmil, transformer, ilra and rrt: every parity case, and every parameter by finite differences.
#include "mil.h"
#include "check.h"
#include "replay.h"

// Finite differences go over every parameter; 256 landmarks would take minutes, so rrt's are checked with 4 of them below.
static void run_case(const char *name)
{
    char path[256];
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    replay r;
    const int slow = strncmp(name, "rrt", 3) == 0 && !strstr(name, "applyattn");
    o.threads = 1;
    if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
    for (int differences = 0; differences <= (!MIL_REAL_IS_FLOAT && !slow); differences++) {
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

// Options that no case shows, by finite differences over every parameter.
static void run_options(const char *name, const char *options, int64_t bags, int64_t instances)
{
    static const int64_t labels[3] = { 1, 0, 1 };
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    replay r;
    if (MIL_REAL_IS_FLOAT) return;
    o.threads = 1;
    if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
    if (replay_make(&r, ctx, name, options, bags, instances, labels, 5)) replay_differences(&r);
    CHECK_STRING(r.why, "");
    replay_free(&r);
    CHECK(mil_context_bytes(ctx) == 0);
    mil_context_free(ctx);
}

#define RRT "in_dim=5 embed_dim=6 mlp_dim=6 n_heads=2 trans_dim=3 num_landmarks=4 peg_k=3 "
TEST(rrt_nystrom) { run_options("rrt", RRT, 1, 11); }
TEST(rrt_nystrom_batch_ffn) { run_options("rrt", RRT "act=none ffn=true mlp_ratio=1.5 n_cycle=2", 2, 8); }
TEST(rrt_positions_first) { run_options("rrt", RRT "apply_pos=true pos=ppeg pos_pos=-1", 1, 10); }
TEST(rrt_positions_between) { run_options("rrt", RRT "apply_pos=true pos=peg", 1, 60); }
TEST(rrt_multi_scale) { run_options("rrt", RRT "multi_scale=true n_layers=3 da_gated=true da_bias=true da_act=silu", 1, 13); }
TEST(rrt_dropout) { run_options("rrt", RRT "dropout=0.3 drop_path=0.4 da_dropout=true da_act=gelu", 3, 9); }
TEST(rrt_mean_pool) { run_options("rrt", RRT "pool=mean act=gelu", 1, 9); }
TEST(rrt_regions_of_a_size) { run_options("rrt", RRT "apply_attn=true attn=rrt region_size=2 epeg=true", 2, 10); }
TEST(transmil_dropout) { run_options("transmil", "in_dim=5 embed_dim=6 num_heads=4 attn_dropout=0.2 num_fc_layers=2", 2, 7); }
TEST(transmil_one_block) { run_options("transmil", "in_dim=5 embed_dim=6 num_heads=2 num_attention_layers=1", 1, 6); }
TEST(transformer_dropout) { run_options("transformer", "in_dim=5 embed_dim=6 num_heads=2 dropout=0.3 encoder_mlp_dim=7 num_fc_layers=2", 1, 9); }
TEST(transformer_one_block) { run_options("transformer", "in_dim=5 embed_dim=6 num_heads=3 num_attention_layers=1 return_attention=true encoder_mlp_dim=4", 1, 5); }
TEST(ilra_one_latent) { run_options("ilra", "in_dim=5 embed_dim=6 num_heads=2 topk=1", 2, 5); }

// X(name of the test, name of the case)
#define CASES(X) \
    X(transmil_base_eval, "transmil-base-eval") \
    X(transmil_base_train, "transmil-base-train") \
    X(transmil_batch2_train, "transmil-batch2-train") \
    X(transmil_fc2_l3_h2_train, "transmil-fc2-l3-h2-train") \
    X(transmil_l1_train, "transmil-l1-train") \
    X(transmil_n1_eval, "transmil-n1-eval") \
    X(transmil_nopad_eval, "transmil-nopad-eval") \
    X(transformer_base_eval, "transformer-base-eval") \
    X(transformer_base_train, "transformer-base-train") \
    X(transformer_n1_eval, "transformer-n1-eval") \
    X(transformer_nomlp_l3_fc2_train, "transformer-nomlp-l3-fc2-train") \
    X(transformer_return_attention_train, "transformer-return-attention-train") \
    X(ilra_base_eval, "ilra-base-eval") \
    X(ilra_base_train, "ilra-base-train") \
    X(ilra_l1_batch2_train, "ilra-l1-batch2-train") \
    X(ilra_n1_eval, "ilra-n1-eval") \
    X(ilra_noln_train, "ilra-noln-train") \
    X(rrt_applyattn_epeg_train, "rrt-applyattn-epeg-train") \
    X(rrt_applyattn_minregion_eval, "rrt-applyattn-minregion-eval") \
    X(rrt_applypos_peg_dadrop_eval, "rrt-applypos-peg-dadrop-eval") \
    X(rrt_applypos_ppeg_train, "rrt-applypos-ppeg-train") \
    X(rrt_attn_ignored_eval, "rrt-attn-ignored-eval") \
    X(rrt_base_eval, "rrt-base-eval") \
    X(rrt_base_train, "rrt-base-train") \
    X(rrt_cycle2_l1_batch2_train, "rrt-cycle2-l1-batch2-train") \
    X(rrt_ffn_gated_l3_train, "rrt-ffn-gated-l3-train") \
    X(rrt_meanpool_eval, "rrt-meanpool-eval") \
    X(rrt_multiscale_train, "rrt-multiscale-train") \
    X(rrt_n300_train, "rrt-n300-train")

#define CASE_TEST(test, name) TEST(test) { run_case(name); }
CASES(CASE_TEST)

#define CASE_ROW(test, name) T(test)
TESTS(CASES(CASE_ROW) T(rrt_nystrom) T(rrt_nystrom_batch_ffn) T(rrt_positions_first) T(rrt_positions_between) T(rrt_multi_scale)
      T(rrt_dropout) T(rrt_mean_pool) T(rrt_regions_of_a_size) T(transmil_dropout) T(transmil_one_block) T(transformer_dropout)
      T(transformer_one_block) T(ilra_one_latent))
