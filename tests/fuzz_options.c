// Model names and options: the first line is the name, the rest the options, as text or as JSON. Small sizes are put in
// front, so that what is accepted is quickly made; it is scored, saved, opened again and must print the same configuration.
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char text[] = "in_dim=3 embed_dim=4 attn_dim=2 ", object[] = "{\"in_dim\":3,\"embed_dim\":4,\"attn_dim\":2";
    mil_context *ctx = fuzz_context();
    const size_t before = fuzz_live;
    char *name = (char *)malloc(size + 1), *options = (char *)malloc(size + 64), *config = NULL, *again = NULL;
    uint8_t *saved = NULL;
    FUZZ_CHECK(name && options);
    fuzz_limit = (size_t)1 << 20;
    if (size) memcpy(name, data, size);
    name[size] = 0;
    char *line = strchr(name, '\n'), *rest = line ? line + 1 : name + strlen(name);
    if (line) *line = 0;
    if (rest[0] == '{') {                                  // {"a":1} -> {"in_dim":3,...,"a":1}
        strcpy(options, object);
        if (rest[1] != '}') strcat(options, ",");
        strcat(options, rest + 1);
    } else {
        strcpy(options, text);
        strcat(options, rest);
    }
    mil_model *model = mil_create(ctx, name, options);
    fuzz_status(ctx, mil_error_status(ctx));
    FUZZ_CHECK((model == NULL) == (mil_error_status(ctx) != MIL_OK));
    if (model) {
        const size_t length = mil_model_config(model, NULL, 0);
        config = (char *)malloc(length + 1);
        FUZZ_CHECK(config && mil_model_config(model, config, length + 1) == length && strlen(config) == length);
        fuzz_score(model);
        size_t bytes = 0;
        if (mil_save_memory(model, NULL, &bytes) == MIL_OK && (saved = (uint8_t *)malloc(bytes)) != NULL) {
            const mil_status status = mil_save_memory(model, saved, &bytes);
            fuzz_status(ctx, status);
            mil_model *copy = status == MIL_OK ? mil_open_memory(ctx, saved, bytes) : NULL;
            FUZZ_CHECK(copy || mil_error_status(ctx) == MIL_ERROR_NO_MEMORY);
            if (copy) {
                again = (char *)malloc(length + 1);
                FUZZ_CHECK(again && mil_model_config(copy, again, length + 1) == length && strcmp(config, again) == 0);
            }
            mil_model_free(copy);
        }
    }
    mil_model_free(model);
    FUZZ_CHECK(fuzz_live == before);
    free(name);
    free(options);
    free(config);
    free(again);
    free(saved);
    return 0;
}
