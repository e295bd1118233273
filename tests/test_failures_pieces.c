// build: float private
// The tests of test_failures.c where each piece of an arena (a node, a key, a plan) is an allocation of its own and fails by itself.
#define MILI_FIRST_CHUNK 0
#define MIL_IMPLEMENTATION
#include "test_failures.c"
