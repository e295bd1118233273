// The one object that most tests, the tool and the examples link with.
#define MIL_IMPLEMENTATION
#include "mil.h"
