# mil.h needs no build: copy the file. This builds the tool, the tests and the examples, and installs the headers.
# CC, CXX, CFLAGS, LDFLAGS, PREFIX, DESTDIR are the user's; what we need ourselves stands in MIL_* variables and is added.

ifeq ($(origin CC),default)
CC       := cc
endif
ifeq ($(origin CXX),default)
CXX      := c++
endif
CFLAGS   ?=
LDFLAGS  ?=
PREFIX   ?= /usr/local
DESTDIR  ?=
CONFIG   ?= release
VARIANTS ?= float double
ONLY     ?=
FUZZ_CC  ?= clang
FUZZ_SECONDS ?= 60
MIL_DATA ?= ../shared/data
GCOV     ?= gcov
PYTHON   ?= python3
BENCH    ?=

# As many jobs as processors; a -j on the command line wins over it.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
endif
MAKEFLAGS += --no-print-directory

VERSION := $(shell sed -n 's/^\#define MIL_VERSION *"\(.*\)".*/\1/p' mil.h 2>/dev/null)
VERSION := $(if $(VERSION),$(VERSION),0.1.0)

# ---- configurations: build/<config>/ each; MIL_OPT for the library and the tool, MIL_TEST_OPT for the tests' own code
MIL_OPT      := -O2
MIL_TEST_OPT := -O1
ifeq ($(CONFIG),release)
else ifeq ($(CONFIG),debug)
MIL_OPT      := -O0 -g
MIL_TEST_OPT := -O0 -g
else ifeq ($(CONFIG),asan)
export ASAN_OPTIONS := allocator_may_return_null=1$(if $(ASAN_OPTIONS),:$(ASAN_OPTIONS))
MIL_OPT      := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
MIL_TEST_OPT := $(MIL_OPT)
else ifeq ($(CONFIG),tsan)
export TSAN_OPTIONS := allocator_may_return_null=1$(if $(TSAN_OPTIONS),:$(TSAN_OPTIONS))
MIL_OPT      := -O1 -g -fsanitize=thread
MIL_TEST_OPT := $(MIL_OPT)
else ifeq ($(CONFIG),msan)
export MSAN_OPTIONS := allocator_may_return_null=1$(if $(MSAN_OPTIONS),:$(MSAN_OPTIONS))
MIL_OPT      := -O1 -g -fno-omit-frame-pointer -fsanitize=memory -fsanitize-memory-track-origins
MIL_TEST_OPT := $(MIL_OPT)
else ifeq ($(CONFIG),coverage)
MIL_OPT      := -O0 -g --coverage
MIL_TEST_OPT := $(MIL_OPT)
else
$(error CONFIG=$(CONFIG): release, debug, asan, tsan, msan or coverage)
endif

B            := build/$(CONFIG)
MIL_CFLAGS   := -std=c99 -D_POSIX_C_SOURCE=200809L -I. -Itests -Wall -Wextra -Wshadow -Wpedantic
MIL_LIBS     := -lm -lpthread
COMPILE       = $(CC) $(MIL_CFLAGS) -MMD -MP
DOUBLE       := -DMIL_REAL=double

# ---- tests: what each file asks for stands in its first line, `// build: [float] [double] [private]`; float is the default.
# A private test has the implementation in itself, all others link with one object per arithmetic type.
TESTS        := $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
asks          = $(filter $(TESTS),$(patsubst tests/%.c,%,$(shell grep -l '^// build:.*$(1)' tests/test_*.c 2>/dev/null)))
IN_DOUBLE    := $(call asks,double)
IN_FLOAT     := $(filter-out $(filter-out $(call asks,float),$(IN_DOUBLE)),$(TESTS))
PRIVATE      := $(call asks,private)
FUZZERS      := $(patsubst tests/%.c,%,$(wildcard tests/fuzz_*.c))
REPLAYS      := $(filter-out fuzz_replay,$(FUZZERS))
FUZZED       := $(if $(ONLY),$(filter $(addprefix fuzz_,$(ONLY)),$(REPLAYS)),$(REPLAYS))
EXAMPLES     := $(patsubst examples/%.c,%,$(wildcard examples/*.c))
SCRIPTS      := $(patsubst tests/%.sh,%,$(filter-out tests/check_symbols.sh tests/run_examples.sh tests/summary.sh,$(wildcard tests/check_*.sh)))

RUNS := $(if $(filter float,$(VARIANTS)),$(IN_FLOAT) $(REPLAYS)) $(if $(filter double,$(VARIANTS)),$(addsuffix _double,$(IN_DOUBLE)))
ifeq ($(CONFIG)$(findstring float,$(VARIANTS)),releasefloat)
RUNS += $(SCRIPTS)
endif
ifneq ($(filter float,$(VARIANTS)),)
RUNS += $(if $(EXAMPLES),examples)
endif
ifneq ($(ONLY),)
RUNS := $(filter $(addsuffix %,$(addprefix test_,$(ONLY)) $(ONLY)),$(RUNS))
endif
LOGS := $(patsubst %,$(B)/logs/%.log,$(RUNS))

.PHONY: help test double mil demo models real assumption examples bench asan tsan coverage fuzz warnings macros msan failures hostile selftest valgrind matrix cpus embedded size mutate install uninstall clean FORCE
.DELETE_ON_ERROR:
.SECONDARY:

help: ## prints this list
	@echo 'mil.h $(VERSION): copy mil.h, or:'
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo 'CC, CFLAGS, LDFLAGS, PREFIX, DESTDIR as usual; ONLY="metrics ops" narrows test, asan, tsan; CONFIG=debug.'

test: $(LOGS) ## builds and runs every test; the last line is `N passed, N failed`
	@sh tests/summary.sh $(LOGS)

double: ## the tests that also run in double, alone
	@$(MAKE) test VARIANTS=double

asan: ## the tests under address and undefined-behaviour sanitizers
	@$(MAKE) test CONFIG=asan

tsan: ## the tests under the thread sanitizer
	@$(MAKE) test CONFIG=tsan

msan: ## the tests under the memory sanitizer (clang)
	@$(MAKE) test CONFIG=msan CC=$(FUZZ_CC) VARIANTS=float ONLY="$(if $(ONLY),$(ONLY),files hostile failures loss metrics ops scorer selftest tape threads train)"

# ---- trust: each answers one question of somebody who builds a device with mil.h; the README says what they promise
failures: export MIL_TEST_ALL := 1
failures: ## every allocation, read and write made to fail in turn
	@$(MAKE) test ONLY="failures files model scorer selftest tape train"

hostile: ## malformed files, options and checkpoints, rule by rule, and what the fuzzers found
	@$(MAKE) test ONLY="hostile files fuzz" VARIANTS=float

selftest: ## version and self-test on every CPU tier of this machine
	@$(MAKE) test ONLY="selftest threads"

valgrind: $(patsubst %,$(B)/%,test_hostile test_failures test_scorer) ## some of the tests under valgrind
	@for t in $^; do valgrind -q --error-exitcode=1 --leak-check=full $$t || exit 1; done

matrix: ## the self-test under every compiler, language, optimisation, mode and macro that is here
	@sh tests/matrix.sh build/matrix

cpus: ## the tests on aarch64, armv7, riscv64, s390x, i386 under qemu, and with musl (CPUS, CPU_TESTS narrow it)
	@sh tests/cpus.sh build/cpus $(CPU_TESTS)

embedded: ## bare-metal builds, a fixed-block program on emulated ARM against the host's logits, a build for Windows
	@CC='$(CC)' sh tests/embedded.sh build/embedded

size: ## code size, stack and compile time against their budgets
	@CC='$(CC)' sh tests/size.sh build/size

mutate: ## flips operators and constants of mil.h one by one and counts who notices (MUTANTS, SEED)
	@sh tests/mutate.sh build/mutate $(MUTANTS) $(SEED)

mil: build/mil ## the command line tool, build/mil

demo: build/mil ## a synthetic cohort from start to heatmap, in a minute
	build/mil demo build/demo

models: $(B)/models $(B)/models.cost ## the README's tables of models: size, AUROC, time, memory (MODEL, MIL_DATA)
	@$(B)/models table build/models $(B)/models.cost $(MODEL)
	@$(B)/models sets '$(MIL_DATA)' $(MODEL)

real: $(B)/real ## cross-validates on published sets beside reference figures; MIL_DATA=FOLDER names them (SET, SEEDS)
	$(B)/real '$(MIL_DATA)' $(if $(SEEDS),seeds=$(SEEDS)) $(SET)

assumption: $(B)/assumption ## says for each model whether it respects the MIL assumption (MODEL="abmil clam" for some)
	$(B)/assumption build/assumption $(MODEL)

examples: $(patsubst %,$(B)/examples/%,$(EXAMPLES)) ## builds examples/*.c into build/<config>/examples

bench: $(B)/bench $(B)/bench_cblas.log $(B)/mil ## measures speed and memory beside the peers that are installed (PYTHON, BENCH)
	@PYTHON='$(PYTHON)' $(B)/bench $(BENCH)

# ---- objects
$(B)/mil_float.o: tests/mil_impl.c mil.h | $(B)
	$(COMPILE) $(MIL_OPT) $(CFLAGS) -c -o $@ $<

$(B)/mil_double.o: tests/mil_impl.c mil.h | $(B)
	$(COMPILE) $(MIL_OPT) $(DOUBLE) $(CFLAGS) -c -o $@ $<

# $(1) suffix, $(2) flags, $(3) object
define test_rules
$(patsubst %,$(B)/%$(1),$(filter-out $(PRIVATE),$(TESTS))): $(B)/%$(1): tests/%.c $(3) | $(B)
	$$(COMPILE) $$(MIL_TEST_OPT) $(2) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$< $(3) $$(MIL_LIBS)

$(patsubst %,$(B)/%$(1),$(PRIVATE)): $(B)/%$(1): tests/%.c mil.h | $(B)
	$$(COMPILE) $$(MIL_TEST_OPT) $(2) $$(CFLAGS) $$(LDFLAGS) -o $$@ $$< $$(MIL_LIBS)

endef
ifneq ($(TESTS),)
$(eval $(call test_rules,,,$(B)/mil_float.o))
$(eval $(call test_rules,_double,$(DOUBLE),$(B)/mil_double.o))
endif

ifneq ($(REPLAYS),)
$(patsubst %,$(B)/%,$(REPLAYS)): $(B)/%: tests/%.c tests/fuzz_replay.c tests/fuzz.h tests/fuzz_tool.h $(wildcard tools/*.h) $(B)/mil_float.o | $(B)
	$(CC) $(MIL_CFLAGS) $(MIL_TEST_OPT) $(CFLAGS) $(LDFLAGS) -o $@ $(filter %.c %.o,$^) $(MIL_LIBS)
endif

# The tool and the examples define MIL_IMPLEMENTATION themselves, as a user's program does. Here that line is taken out
# (line numbers stay) and they link with the object that the tests use: the header is compiled once, beside them.
LINKED = sed 's/^\( *\# *define MIL_IMPLEMENTATION\).*//' $< > $(1) && \
	$(COMPILE) $(2) -I$(<D) $(CFLAGS) $(LDFLAGS) -o $@ $(1) $(B)/mil_float.o $(MIL_LIBS)

ifneq ($(EXAMPLES),)
$(patsubst %,$(B)/examples/%,$(EXAMPLES)): $(B)/examples/%: examples/%.c $(B)/mil_float.o | $(B)
	$(call LINKED,$(B)/examples/$*.c,$(MIL_TEST_OPT))
endif

$(B)/bench: tools/bench.c $(B)/mil_float.o | $(B)
	$(call LINKED,$(B)/bench_main.c,$(MIL_OPT))

# mil.h over a CBLAS, where one is installed; the bench says so when it is not.
CBLAS_LIBS ?= -lopenblas
$(B)/bench_cblas.log: tools/bench.c mil.h | $(B)
	@rm -f $(B)/bench_cblas
	@$(CC) $(MIL_CFLAGS) $(MIL_OPT) -DMIL_USE_CBLAS $(CFLAGS) $(LDFLAGS) -o $(B)/bench_cblas $< $(CBLAS_LIBS) $(MIL_LIBS) > $@ 2>&1 || \
	    echo 'no bench over a CBLAS: $(CBLAS_LIBS) did not build (see $@)'
	@touch $@

$(B)/real $(B)/assumption $(B)/models: $(B)/%: tools/%.c $(B)/mil_float.o | $(B)
	$(call LINKED,$(B)/$*.c,$(MIL_OPT))

$(B)/models.cost: $(B)/models $(B)/bench
	$(B)/models cost build/models $(B)/bench > $@

$(B)/mil: tools/mil.c $(B)/mil_float.o | $(B)
	$(call LINKED,$(B)/mil_tool.c,$(MIL_OPT))

build/mil: build/release/mil
	@cp $< $@

ifneq ($(CONFIG),release)
build/release/mil: FORCE
	@$(MAKE) CONFIG=release $@
endif

$(B):
	@mkdir -p $(B)/logs $(B)/examples

# ---- runs: each into a log whose last line is `exit STATUS`; failing runs are counted and shown by tests/summary.sh
RUN = { $(1); echo "exit $$?"; } > $@ 2>&1; sed -n 's/^/$(2): /; /[0-9] passed, [0-9]* failed/p' $@ | tail -n 1

$(B)/logs/examples.log: $(patsubst %,$(B)/examples/%,$(EXAMPLES)) FORCE | $(B)
	@$(call RUN,sh tests/run_examples.sh $(B)/examples,examples)

$(B)/logs/check_tool.log: $(B)/mil

$(B)/logs/check_%.log: tests/check_%.sh mil.h FORCE | $(B)
	@$(call RUN,CC='$(CC)' CXX='$(CXX)' sh $< $(B)/check_$*,check_$*)

$(B)/logs/fuzz_%.log: $(B)/fuzz_% FORCE
	@$(call RUN,$< tests/corpus/$*,fuzz_$*)

$(B)/logs/%.log: $(B)/% FORCE
	@$(call RUN,$<,$*)

FORCE:

# ---- coverage
coverage: ## line and branch coverage of mil.h, and the lines that no test reaches
	@$(MAKE) test CONFIG=coverage
	@sh tests/coverage.sh build/coverage '$(GCOV)'

# ---- fuzzing: tests/fuzz_NAME.c has LLVMFuzzerTestOneInput, its corpus is tests/corpus/NAME
# FUZZ_RUNS=10000000 is what a release wants of each. A small quarantine and short stacks of allocations keep targets fast.
fuzz: export ASAN_OPTIONS := quarantine_size_mb=2:malloc_context_size=4$(if $(ASAN_OPTIONS),:$(ASAN_OPTIONS))
fuzz: $(patsubst %,build/fuzz/%,$(FUZZED)) ## each fuzz target for FUZZ_SECONDS, or FUZZ_RUNS inputs (clang with libFuzzer; ONLY="json npy")
	@for f in $(patsubst fuzz_%,%,$(FUZZED)); do \
	    mkdir -p build/fuzz/found/$$f; \
	    build/fuzz/fuzz_$$f $(if $(FUZZ_RUNS),-runs=$(FUZZ_RUNS),-max_total_time=$(FUZZ_SECONDS)) -print_final_stats=1 -artifact_prefix=build/fuzz/$$f- build/fuzz/found/$$f tests/corpus/$$f || exit 1; \
	done

ifneq ($(REPLAYS),)
FUZZ = $(FUZZ_CC) $(MIL_CFLAGS) -O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all

build/fuzz/mil.o: tests/mil_impl.c mil.h
	@mkdir -p build/fuzz
	$(FUZZ) -fsanitize=fuzzer-no-link -c -o $@ $<

$(patsubst %,build/fuzz/%,$(REPLAYS)): build/fuzz/%: tests/%.c tests/fuzz.h tests/fuzz_tool.h $(wildcard tools/*.h) build/fuzz/mil.o
	$(FUZZ) -fsanitize=fuzzer -o $@ $< build/fuzz/mil.o $(MIL_LIBS)
endif

# ---- the header under every compiler and standard that is here, and with every macro alone
warnings: ## strict warnings as errors: gcc and clang, C99, C11, C++11, C++17, float and double
	@sh tests/warnings.sh build/warnings

macros: ## every configuration macro alone, both include styles, symbols
	@CC='$(CC)' CXX='$(CXX)' sh tests/check_build.sh $(B)/check_build

# ---- installing
install: ## mil.h, mil_cuda.h, mil.pc into $(DESTDIR)$(PREFIX)
	mkdir -p '$(DESTDIR)$(PREFIX)/include' '$(DESTDIR)$(PREFIX)/lib/pkgconfig'
	for f in mil.h mil_cuda.h; do test ! -f $$f || cp $$f '$(DESTDIR)$(PREFIX)/include/' || exit 1; done
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: mil' \
	    'Description: multiple instance learning for whole slide images in one C header' 'Version: $(VERSION)' \
	    'Cflags: -I$${includedir}' 'Libs: -lm -lpthread' > '$(DESTDIR)$(PREFIX)/lib/pkgconfig/mil.pc'

uninstall: ## takes them away again
	rm -f '$(DESTDIR)$(PREFIX)/include/mil.h' '$(DESTDIR)$(PREFIX)/include/mil_cuda.h' '$(DESTDIR)$(PREFIX)/lib/pkgconfig/mil.pc'

clean: ## removes build/
	rm -rf build

-include $(wildcard $(B)/*.d $(B)/examples/*.d)
