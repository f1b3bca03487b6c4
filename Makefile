# orch: build, test, install. `make help` lists the targets.
# Needs GNU make and a C compiler; `make deps` installs what else is needed on Debian 12.

VERSION := 0.1.0
PREFIX  ?= /usr/local
DESTDIR ?=
CC      ?= cc
V       ?= 0

# ---- build features: the one table. FEATURES="a b" switches on exactly these.
#   apt-kernel  `image build` can take Debian's cloud kernel with apt-get; without it --kernel is needed
#   trust       the trust database (SQLite, loaded when first used); without it a configuration in the
#               working directory is always refused
KNOWN_FEATURES := apt-kernel trust
FEATURES ?= $(KNOWN_FEATURES)
UNKNOWN_FEATURES := $(filter-out $(KNOWN_FEATURES),$(FEATURES))
ifneq ($(UNKNOWN_FEATURES),)
  $(error unknown feature: $(UNKNOWN_FEATURES); known features: $(KNOWN_FEATURES))
endif
feature_macro = -DORCH_FEATURE_$(shell echo $(1) | tr 'a-z-' 'A-Z_')=$(if $(filter $(1),$(FEATURES)),1,0)
FEATURE_FLAGS := $(foreach f,$(KNOWN_FEATURES),$(call feature_macro,$(f)))

# ---- variants: release (default), asan (address and undefined behaviour sanitizers), fuzz
VARIANT ?= release
B := build/$(VARIANT)

WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wformat=2 -Wcast-qual -Wundef \
        -Wpointer-arith -Wwrite-strings
CFLAGS ?= -O2 -g
ALL_CFLAGS = -std=gnu11 $(WARN) $(WERROR) -fexceptions -fstack-protector-strong -fPIC -fvisibility=hidden \
  -D_GNU_SOURCE -DORCH_VERSION='"$(VERSION)"' -DORCH_FEATURES='"$(strip $(FEATURES))"' -DORCH_PREFIX='"$(PREFIX)"' \
  $(FEATURE_FLAGS) $(shell pkg-config --cflags luajit) $(CFLAGS) $(VARIANT_CFLAGS)
ifeq ($(VARIANT),release)
  VARIANT_CFLAGS := -D_FORTIFY_SOURCE=2
endif
ifeq ($(VARIANT),asan)
  VARIANT_CFLAGS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
  WERROR := -Werror
endif
ifeq ($(VARIANT),fuzz)
  CC := clang
  VARIANT_CFLAGS := -O1 -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=undefined
endif
LDFLAGS_ALL = -Wl,--as-needed -pie $(VARIANT_CFLAGS) $(LDFLAGS)
# libcrypto is linked statically: only its SHA-256 is used, and loading the shared library doubles the start time.
LIBS := -lluajit-5.1 -levent_core -lcjson -lpcre2-8 -l:libcrypto.a -ldl -lm

ROOMS := base http mcp net vm store script bind
LIB_SRC := $(wildcard $(foreach r,$(ROOMS),core/$(r)/*.c)) $(wildcard core/launch/client.c) $(filter-out core/main.c,$(wildcard core/*.c))
LIB_OBJ := $(LIB_SRC:%.c=$(B)/%.o)
LAUNCHER_SRC := $(filter-out core/launch/client.c,$(wildcard core/launch/*.c))
LAUNCHER_OBJ := $(LAUNCHER_SRC:%.c=$(B)/%.o)
TEST_SRC := $(wildcard tests/c/test_*.c)
TEST_BIN := $(TEST_SRC:tests/c/%.c=$(B)/tests/%)
FUZZ_BIN := $(patsubst tests/fuzz/fuzz_%.c,build/fuzz/fuzz_%,$(wildcard tests/fuzz/fuzz_*.c))

Q := $(if $(filter 1,$(V)),,@)
say = $(if $(filter 1,$(V)),,@echo "  $(1)" $(2))

.DEFAULT_GOAL := all
.PHONY: all
all: $(B)/orch $(B)/launcher $(B)/liborch.a $(B)/agent $(B)/lua ## build orch, launcher, liborch.a and the guest agent

$(B)/%.o: %.c Makefile
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

$(B)/liborch.a: $(LIB_OBJ)
	$(call say,AR,$@)
	$(Q)rm -f $@ && ar rcs $@ $^

$(B)/orch: $(B)/core/main.o $(B)/liborch.a
	$(call say,LD,$@)
	$(Q)$(CC) $(LDFLAGS_ALL) -rdynamic -o $@ $(B)/core/main.o $(B)/liborch.a $(LIBS)

$(B)/launcher: $(LAUNCHER_OBJ)
	$(call say,LD,$@)
	$(Q)$(CC) $(LDFLAGS_ALL) -o $@ $^ -lseccomp

# The guest agent: static, no dependency but libc, never instrumented (it runs as PID 1 in the guest).
$(B)/agent: core/guest/agent.c core/guest/wire.h Makefile
	$(call say,CC,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 $(WARN) -Os -g0 -D_GNU_SOURCE -static -no-pie -fno-asynchronous-unwind-tables -Wl,--build-id=none -s -o $@ $<

# Run from the build tree: Lua files are found beside the binary.
$(B)/lua:
	@mkdir -p $(B)
	$(Q)ln -sfn ../../lua $(B)/lua && ln -sfn ../../policies $(B)/policies && ln -sfn ../../orchestrator.lua $(B)/orchestrator.lua

$(B)/tests/%: tests/c/%.c $(B)/liborch.a Makefile
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -MF $@.d -Icore -o $@ $< $(LDFLAGS_ALL) $(B)/liborch.a $(LIBS) -lcmocka

build/fuzz/fuzz_%: tests/fuzz/fuzz_%.c Makefile
	$(call say,FUZZ,$@)
	@mkdir -p $(@D)
	$(Q)$(MAKE) --no-print-directory VARIANT=fuzz build/fuzz/liborch.a
	$(Q)clang -std=gnu11 -D_GNU_SOURCE -g -O1 -fsanitize=address,undefined,fuzzer -Icore $(shell pkg-config --cflags luajit) -o $@ $< build/fuzz/liborch.a $(LIBS)

-include $(shell find build -name '*.d' 2>/dev/null)

.PHONY: clean
clean: ## remove what was built
	rm -rf build

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16
	@echo; echo "FEATURES=\"$(KNOWN_FEATURES)\"  VARIANT=release|asan|fuzz  PREFIX=$(PREFIX)  DESTDIR=  V=1"
