// Checkpoints: a file of weights with its model's name and options inside is opened and scored, or refused. As in
// fuzz_safetensors an input that begins with { lacks the length in front. Behind a byte 1 stands a trainer's state instead.
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    mil_context *ctx = fuzz_context();
    const size_t before = fuzz_live;
#ifndef MIL_NO_TRAINING
    if (size && data[0] == 1) {
        mil_model *model = mil_create(ctx, "abmil", "in_dim=2 embed_dim=2 attn_dim=1");
        FUZZ_CHECK(model != NULL);
        mil_trainer *trainer = mil_trainer_create(model, "optimizer=adamw ema=0.5");
        if (trainer) {
            fuzz_status(ctx, mil_trainer_restore(trainer, data + 1, size - 1));
            float x[4] = { 1, -1, 0.5f, 2 };
            const mil_bag bag = mil_bag_make(x, 2, 2);
            const mil_target target = mil_target_class(1);
            fuzz_status(ctx, mil_trainer_step(trainer, &bag, &target, NULL, NULL));
        }
        mil_trainer_free(trainer);
        mil_model_free(model);
        FUZZ_CHECK(fuzz_live == before);
        return 0;
    }
#endif
    uint8_t *bytes = fuzz_header(&data, &size, "", 0, 8);
    mil_model *model = mil_open_memory(ctx, data, size);
    fuzz_status(ctx, mil_error_status(ctx));
    FUZZ_CHECK((model == NULL) == (mil_error_status(ctx) != MIL_OK));
    FUZZ_CHECK(model || fuzz_peak - before <= 128 * size + 262144);           // the file's own claims cost no memory
    if (model) fuzz_score(model);
    mil_model_free(model);
    FUZZ_CHECK(fuzz_live == before);
    free(bytes);
    return 0;
}
