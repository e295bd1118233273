// Options that make a model of any architecture small: its width in, and 16 for each whole number whose default is larger.
#ifndef NARROW_H
#define NARROW_H

static void narrow_options(const mil_architecture *a, int in_dim, char *text, size_t size)
{
    int at = snprintf(text, size, "in_dim=%d", in_dim);
    for (int k = 0; k < a->option_count; k++)
        if (a->options[k].type == MIL_OPTION_INT && strcmp(a->options[k].name, "in_dim") && atoi(a->options[k].value) > 16)
            at += snprintf(text + at, size - (size_t)at, " %s=16", a->options[k].name);
}

#endif
