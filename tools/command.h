// Commands, their options, and their help, from one table each.
#ifndef TOOL_COMMAND_H
#define TOOL_COMMAND_H
#include "text.h"

typedef struct option { const char *name, *value, *fallback, *help; } option;      // value NULL: a flag; fallback NULL: none

typedef struct arguments arguments;
typedef struct command {
    const char   *name, *operands, *summary, *details;     // details: paragraphs shown after the options
    const option *options;                                 // ends with a NULL name
    int         (*run)(mil_context *ctx, const arguments *a);
} command;

struct arguments {
    const command *command;
    const char   **name, **value;                          // options in the order given
    int            count;
    char         **operand;
    int            operands;
};

TOOL_FN const option *find_option(const command *c, const char *name, size_t length)
{
    for (const option *o = c->options; o && o->name; o++) if (strlen(o->name) == length && memcmp(o->name, name, length) == 0) return o;
    return NULL;
}

// Prints text broken at `width`, each new line indented; newlines stay. The first line begins at column `at`.
TOOL_FN void print_wrapped(const char *s, int at, int indent, int width)
{
    int column = at;
    while (*s) {
        if (*s == '\n') {
            putchar('\n');
            for (s++, column = 0; column < indent && *s && *s != '\n'; column++) putchar(' ');
            while (*s == ' ') { putchar(' '); column++; s++; }                     // kept: an indented line
            continue;
        }
        const int n = (int)strcspn(s, " \n");
        if (column + n > width && column > indent) {
            putchar('\n');
            for (column = 0; column < indent; column++) putchar(' ');
        }
        printf("%.*s", n, s);
        column += n;
        s += n;
        if (*s == ' ') {
            const int next = (int)strcspn(s + 1, " \n");
            if (column + 1 + next <= width) { putchar(' '); column++; }
            else if (s[1] && s[1] != '\n') {
                putchar('\n');
                for (column = 0; column < indent; column++) putchar(' ');
            }
            s++;
        }
    }
    putchar('\n');
}

TOOL_FN void command_help(const command *c)
{
    printf("usage: mil %s %s\n\n", c->name, c->operands);
    print_wrapped(c->summary, 0, 0, 79);
    if (c->options && c->options->name) puts("\noptions:");
    for (const option *o = c->options; o && o->name; o++) {
        const int n = printf("  --%s%s%s", o->name, o->value ? " " : "", o->value ? o->value : "");
        char *help = o->fallback && o->fallback[0] ? tool_format("%s [%s]", o->help, o->fallback) : tool_string(o->help);
        if (n > 25) printf("\n%26s", "");
        else printf("%*s", 26 - n, "");
        print_wrapped(help, 26, 26, 79);
        free(help);
    }
    if (c->details) {
        putchar('\n');
        print_wrapped(c->details, 0, 0, 79);
    }
}

TOOL_FN arguments arguments_parse(const command *c, int argc, char **argv)
{
    arguments a;
    int only_operands = 0;
    memset(&a, 0, sizeof a);
    a.command = c;
    a.name = TOOL_NEW(const char *, argc);
    a.value = TOOL_NEW(const char *, argc);
    a.operand = TOOL_NEW(char *, argc);
    for (int i = 0; i < argc; i++) {
        const char *s = argv[i];
        if (only_operands || s[0] != '-' || !s[1]) { a.operand[a.operands++] = argv[i]; continue; }
        if (strcmp(s, "--") == 0) { only_operands = 1; continue; }
        if (strcmp(s, "-h") == 0 || strcmp(s, "--help") == 0) { command_help(c); exit(0); }
        const size_t length = strcspn(s, "=");
        const option *o = length > 2 && s[1] == '-' ? find_option(c, s + 2, length - 2) : NULL;
        if (!o) {
            char *bare = tool_copy(s, length);
            const char *best = NULL;
            int distance = 1000;
            for (const option *k = c->options; k && k->name; k++) name_nearer(bare + strspn(bare, "-"), k->name, &best, &distance);
            if (best) tool_usage("%s: no option %s; did you mean --%s? (mil %s --help)", c->name, bare, best, c->name);
            tool_usage("%s: no option %s (mil %s --help)", c->name, bare, c->name);
        }
        a.name[a.count] = o->name;
        if (!o->value) {
            if (s[length]) tool_usage("%s: option --%s takes no value", c->name, o->name);
            a.value[a.count++] = "";
        } else if (s[length]) {
            a.value[a.count++] = s + length + 1;
        } else {
            if (i + 1 >= argc) tool_usage("%s: option --%s needs a value: %s", c->name, o->name, o->value);
            a.value[a.count++] = argv[++i];
        }
    }
    return a;
}

TOOL_FN void arguments_free(arguments *a)
{
    free((void *)a->name);
    free((void *)a->value);
    free((void *)a->operand);
}

// The last value given, else the default, else NULL. A flag that was given is "".
TOOL_FN const char *argument(const arguments *a, const char *name)
{
    for (int i = a->count - 1; i >= 0; i--) if (strcmp(a->name[i], name) == 0) return a->value[i];
    const option *o = find_option(a->command, name, strlen(name));
    return o ? o->fallback : NULL;
}

TOOL_FN int argument_given(const arguments *a, const char *name)
{
    for (int i = 0; i < a->count; i++) if (strcmp(a->name[i], name) == 0) return 1;
    return 0;
}

TOOL_FN const char *argument_needed(const arguments *a, const char *name)
{
    const char *s = argument(a, name);
    if (!s || !s[0]) tool_usage("%s: option --%s is needed (mil %s --help)", a->command->name, name, a->command->name);
    return s;
}

TOOL_FN int64_t argument_int(const arguments *a, const char *name, int64_t low, int64_t high)
{
    const char *s = argument(a, name);
    int64_t x = 0;
    if (s && (!parse_int(s, &x) || x < low || x > high))
        tool_usage("%s: option --%s %s: a whole number from %lld to %lld is needed", a->command->name, name, s, (long long)low, (long long)high);
    return x;
}

TOOL_FN double argument_real(const arguments *a, const char *name, double low, double high)
{
    const char *s = argument(a, name);
    double x = 0;
    if (s && (!parse_real(s, &x) || x < low || x > high))
        tool_usage("%s: option --%s %s: a number from %g to %g is needed", a->command->name, name, s, low, high);
    return x;
}

// One of "a|b|c".
TOOL_FN const char *argument_choice(const arguments *a, const char *name, const char *choices)
{
    const char *s = argument(a, name);
    for (const char *p = choices; s && *p;) {
        const size_t n = strcspn(p, "|");
        if (strlen(s) == n && memcmp(p, s, n) == 0) return s;
        p += n + (p[n] == '|');
    }
    if (s) tool_usage("%s: option --%s %s: one of %s is needed", a->command->name, name, s, choices);
    return s;
}
#endif
