// Parity cases as `mil check` reads them: any file is replayed, fails or is skipped with a reason. As in fuzz_safetensors an
// input that begins with { lacks the length in front.
#include "fuzz_tool.h"
#include "../tools/parity.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    mil_context *ctx;
    uint8_t *bytes = fuzz_grow(NULL, size + 8);
    fuzz_limit = (size_t)2 << 20;
    if (size > 1 && data[0] == '{') {
        const uint8_t *end = (const uint8_t *)memchr(data, 0, size);
        const size_t header = end ? (size_t)(end - data) : size, rest = end ? size - header - 1 : 0;
        for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((uint64_t)header >> (8 * i));
        memcpy(bytes + 8, data, header);
        if (rest) memcpy(bytes + 8 + header, end + 1, rest);
        size = 8 + header + rest;
    } else if (size) memcpy(bytes, data, size);
    const char *path = fuzz_file(bytes, size);
    mil_context_options options = mil_context_options_default();
    options.allocator.reallocate = fuzz_reallocate;
    options.threads = 1;
    FUZZ_CHECK(mil_context_create(&ctx, &options) == MIL_OK);
    if (setjmp(fuzz_back) == 0) {
        replay_file(ctx, path, 0, 0);
        mil_context_free(ctx);
        FUZZ_CHECK(fuzz_live == 0);
    }
    fuzz_live = 0;                                         // what a jump left behind is gone with the pieces
    fuzz_release_all();
    return 0;
}
