// main for the fuzz targets where no fuzzer is at hand: every file of the folders and files named on the command line goes
// through LLVMFuzzerTestOneInput once, then every prefix of the small ones, and the empty input. Surviving is passing.
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// 1 when the file could be read and was replayed.
static int replay_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    uint8_t *data = NULL;
    size_t size = 0, room = 0, got;
    int ok = f != NULL;
    while (ok) {
        if (size == room) {
            uint8_t *more = (uint8_t *)realloc(data, room = room ? 2 * room : 4096);
            if (!more) { ok = 0; break; }
            data = more;
        }
        got = fread(data + size, 1, room - size, f);
        if (got == 0) break;
        size += got;
    }
    if (ok) {
        const size_t step = size / 256 + 1;                // at most 257 prefixes, each in a block of its own length
        for (size_t part = 0; part <= size; part = part < size && part + step > size ? size : part + step) {
            uint8_t *exact = (uint8_t *)malloc(part ? part : 1);
            if (!exact) break;
            if (part) memcpy(exact, data, part);
            LLVMFuzzerTestOneInput(exact, part);
            free(exact);
        }
    }
    if (f) fclose(f);
    free(data);
    if (!ok) printf("FAIL cannot read %s\n", path);
    return ok;
}

int main(int argc, char **argv)
{
    int passed = 0, failed = 0;
    for (int i = 1; i < argc; i++) {
        DIR *dir = opendir(argv[i]);
        struct dirent *entry;
        if (!dir) {
            *(replay_file(argv[i]) ? &passed : &failed) += 1;
            continue;
        }
        while ((entry = readdir(dir)) != NULL) {
            char path[1024];
            if (entry->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "%.500s/%.500s", argv[i], entry->d_name);
            *(replay_file(path) ? &passed : &failed) += 1;
        }
        closedir(dir);
    }
    LLVMFuzzerTestOneInput((const uint8_t *)"", 0);
    printf("%d passed, %d failed\n", passed + 1, failed);
    return failed > 0;
}
