// The one object that most tests, the tool and the examples link with.
#include <assert.h>
#define MIL_ASSERT(x) assert(x)
#define MIL_IMPLEMENTATION
#include "mil.h"
