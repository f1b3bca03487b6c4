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

# ---- variants: release (default), asan (address and undefined behaviour sanitizers), tsan (threads), fuzz
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
ifeq ($(VARIANT),tsan)
  VARIANT_CFLAGS := -O1 -fsanitize=thread -fno-omit-frame-pointer
  WERROR := -Werror
endif
ifeq ($(VARIANT),fuzz)
  CC := clang
  VARIANT_CFLAGS := -O1 -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=undefined
endif
LDFLAGS_ALL = -Wl,--as-needed -pie $(VARIANT_CFLAGS) $(LDFLAGS)
# libcrypto is linked statically: only its SHA-256 is used, and loading the shared library doubles the start time.
LIBS := -lluajit-5.1 -levent_core -lcjson -lpcre2-8 -l:libcrypto.a -ldl -lm

ROOMS := base http mcp launch net image vm store script policy call bind upstream host
LIB_SRC := $(wildcard $(foreach r,$(ROOMS),core/$(r)/*.c))
LIB_OBJ := $(LIB_SRC:%.c=$(B)/%.o) $(B)/compiled.o
LAUNCHER_SRC := $(wildcard core/launcher/*.c)
LAUNCHER_OBJ := $(LAUNCHER_SRC:%.c=$(B)/%.o)
TEST_SRC := $(wildcard tests/c/test_*.c)
TEST_BIN := $(TEST_SRC:tests/c/%.c=$(B)/tests/%)
FUZZ_BIN := $(patsubst tests/fuzz/fuzz_%.c,build/fuzz/fuzz_%,$(wildcard tests/fuzz/fuzz_*.c))

Q := $(if $(filter 1,$(V)),,@)
say = $(if $(filter 1,$(V)),,@echo "  $(1)" $(2))

.DEFAULT_GOAL := all
.PHONY: all
all: $(B)/orch $(B)/launcher $(B)/liborch.a $(B)/agent $(B)/lua ## build orch, launcher, liborch.a and the guest agent

# What the user can set: everything compiled with other settings is compiled again.
$(B)/settings: FORCE
	@mkdir -p $(@D)
	@echo "$(CC) $(FEATURES) $(CFLAGS)" | cmp -s - $@ || echo "$(CC) $(FEATURES) $(CFLAGS)" > $@
.PHONY: FORCE
FORCE:

$(B)/%.o: %.c Makefile $(B)/settings
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

# orch's own Lua files that every start needs; another text of them on the disk is compiled there and then.
COMPILED := $(wildcard lua/*.lua lua/policy/*.lua lua/tools/*.lua)
$(B)/compiled.c: core/script/compile.lua $(COMPILED)
	@mkdir -p $(@D)
	$(Q)luajit $< $(COMPILED) > $@.tmp && mv $@.tmp $@
$(B)/compiled.o: $(B)/compiled.c Makefile $(B)/settings
	$(call say,CC,$<)
	$(Q)$(CC) $(ALL_CFLAGS) -Icore -c -o $@ $<

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
AGENT_SRC := $(wildcard core/guest/*.c)
$(B)/agent: $(AGENT_SRC) $(wildcard core/guest/*.h) Makefile
	$(call say,CC,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 $(WARN) -Os -g0 -D_GNU_SOURCE -static -no-pie -fno-asynchronous-unwind-tables -Wl,--build-id=none -s -o $@ $(AGENT_SRC)

# Run from the build tree: Lua files are found beside the binary.
$(B)/lua:
	@mkdir -p $(B)
	$(Q)ln -sfn ../../lua $(B)/lua && ln -sfn ../../policies $(B)/policies && ln -sfn ../../orchestrator.lua $(B)/orchestrator.lua

$(B)/tests/%: tests/c/%.c $(B)/liborch.a Makefile
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -MF $@.d -Icore -o $@ $< $(LDFLAGS_ALL) $(B)/liborch.a $(LIBS) -lcmocka

$(B)/tests/bench/%: tests/bench/%.c $(B)/liborch.a Makefile
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -MF $@.d -Icore -o $@ $< $(LDFLAGS_ALL) $(B)/liborch.a $(LIBS)

# The one program of VARIANT=tsan, which runs from that build's tree.
TSAN_BIN := build/tsan/tests/test_threads
$(TSAN_BIN): build/tsan/lua

# The escape probe runs in the VMM's place, in a root that holds nothing else.
$(B)/tests/probe: tests/e2e/probe.c Makefile
	$(call say,CC,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 $(WARN) -O1 -g -D_GNU_SOURCE -static -o $@ $<
$(B)/tests/test_launch: $(B)/launcher $(B)/tests/probe
# The same for a guest that is the test's own.
$(B)/tests/wire: tests/e2e/wire.c Makefile
	$(call say,CC,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 $(WARN) -O1 -g -D_GNU_SOURCE -static -o $@ $<
$(B)/tests/test_netns: $(B)/launcher $(B)/tests/wire $(B)/tests/probe

# Runs inside microVMs.
$(B)/tests/attack: tests/e2e/attack.c Makefile
	$(call say,CC,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -std=gnu11 $(WARN) -Os -D_GNU_SOURCE -static -s -o $@ $<
$(B)/tests/test_net_attacks: $(B)/orch $(B)/launcher $(B)/agent $(B)/tests/attack

# With VARIANT=fuzz only, as the target fuzz does.
build/fuzz/fuzz_%: tests/fuzz/fuzz_%.c build/fuzz/liborch.a Makefile
	$(call say,LD,$@)
	@mkdir -p $(@D)
	$(Q)clang -std=gnu11 -D_GNU_SOURCE -g -O1 -fsanitize=address,undefined,fuzzer -Icore $(shell pkg-config --cflags luajit) -o $@ $< build/fuzz/liborch.a $(LIBS)


# ---- Debian packages: name, what it is needed for (run, build, demo, test, suite, fuzz), why
define PACKAGES
libluajit-5.1-2      run    runs policies, tools and scripts
libevent-core-2.1-7  run    the event loop
libcjson1            run    composes JSON documents
libpcre2-8-0         run    schema patterns, redaction
libsqlite3-0         run    trust, grants, sessions; loaded when first used
libcurl4             run    HTTP client; loaded when first used
libssl3              run    libcrypto: OAuth's signed assertions; loaded when first used
libseccomp2          run    system call filter of the launcher
libnftnl11           run    the microVMs' packet filter; loaded when first used
passt                run    pasta, the microVMs' way to the network
qemu-system-x86      run    the virtual machine monitor
busybox-static       run    shell and tools inside the base guest image
lz4                  run    unpacks the guest kernel
mmdebstrap           run    image build debian: installs packages into a folder
erofs-utils          run    image build debian: packs that folder
uidmap               run    image build debian for users with a range of ids, without root
fakechroot           run    the same for users without one
fakeroot             run    the same
gcc                  build  C compiler
make                 build  runs this file
pkg-config           build  finds headers
libluajit-5.1-dev    build  headers
luajit               build  compiles orch's own Lua files
libevent-dev         build  headers
libcjson-dev         build  headers
libpcre2-dev         build  headers
libcurl4-openssl-dev build  headers
libssl-dev           build  libcrypto.a: SHA-256, linked statically
libseccomp-dev       build  headers
libnftnl-dev         build  headers
libsqlite3-dev       build  headers
python3              demo   examples/client.py and the end-to-end tests
libcmocka-dev        test   C unit tests
iproute2             demo   the network namespace that plays the internet
nftables             test   reads the firewall back by another program
procps               test   the host's settings before and after
apparmor             test   the profile of package passt, in force in a microVM
python3-pip          suite  fetches the JSON Schema test suite, and Python peers
clang-format         format lays out the C files
clang                fuzz   libFuzzer
libclang-rt-14-dev   fuzz   its runtime, and the sanitizers'
npm                  conformance  installs the official MCP suite
cargo-web            peers  builds the Rust peer
endef
export PACKAGES
DEPS_FOR ?= run build demo test

.PHONY: deps
deps: ## install the Debian packages that are missing; says which and why first
	@command -v dpkg-query >/dev/null || { echo "deps: no dpkg here; install what these Debian packages hold:"; echo "$$PACKAGES"; exit 1; }
	@have=" $$(dpkg-query -W -f='$${Package}/$${db:Status-Status} ' 2>/dev/null)"; \
	lines=$$(echo "$$PACKAGES" | while read -r name kind why; do \
	    case " $(DEPS_FOR) " in *" $$kind "*) ;; *) continue ;; esac; \
	    case "$$have" in *" $$name/installed "*) ;; *) echo "  $$name ($$kind): $$why" ;; esac; done); \
	[ -n "$$lines" ] || exit 0; \
	echo "Debian packages to install:"; echo "$$lines"; \
	names=$$(echo "$$lines" | sed 's/^ *\([^ ]*\).*/\1/' | tr '\n' ' '); \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif command -v sudo >/dev/null; then sudo=sudo; else \
	    echo "deps: neither root nor sudo; as root: apt-get update && apt-get install --no-install-recommends $$names"; exit 1; fi; \
	$$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$names

# ---- install: a tree that can be moved; orch finds its files relative to its own executable
BINDIR = $(DESTDIR)$(PREFIX)/bin
LIBEXECDIR = $(DESTDIR)$(PREFIX)/libexec/orch
SHAREDIR = $(DESTDIR)$(PREFIX)/share/orch
INCLUDEDIR = $(DESTDIR)$(PREFIX)/include
LIBDIR = $(DESTDIR)$(PREFIX)/lib
define ORCH_PC
prefix=$${pcfiledir}/../..
Name: orch
Description: host for the actions of AI agents: Lua policies, MCP, microVMs
Version: $(VERSION)
Cflags: -I$${prefix}/include
Libs: -L$${prefix}/lib -lorch $(filter-out -l:libcrypto.a,$(LIBS)) -lcrypto
endef
export ORCH_PC

.PHONY: install
install: all ## install into $(DESTDIR)$(PREFIX)
	install -d $(BINDIR) $(LIBEXECDIR) $(SHAREDIR) $(LIBDIR)/pkgconfig $(INCLUDEDIR)
	install $(B)/orch $(BINDIR)
	install $(B)/launcher $(B)/agent $(LIBEXECDIR)
	install -m 644 $(B)/liborch.a $(LIBDIR)
	@echo "$$ORCH_PC" > $(LIBDIR)/pkgconfig/orch.pc && chmod 644 $(LIBDIR)/pkgconfig/orch.pc
	install -m 644 core/orch.h $(INCLUDEDIR)
	install -m 644 orchestrator.lua $(SHAREDIR)
	for f in $$(find lua policies -name '*.lua'); do install -D -m 644 $$f $(SHAREDIR)/$$f || exit 1; done

.PHONY: uninstall
uninstall: ## remove what install put there
	rm -rf $(LIBEXECDIR) $(SHAREDIR)
	rm -f $(BINDIR)/orch $(LIBDIR)/liborch.a $(LIBDIR)/pkgconfig/orch.pc $(INCLUDEDIR)/orch.h

# ---- test
JOBS := -j$(shell nproc)
.PHONY: tests-c asan test net-mutation check-layers fuzz demo bench
tests-c: $(TEST_BIN)

asan: ## build and run the C tests with sanitizers: address and undefined behaviour, one with threads
	@+$(MAKE) --no-print-directory $(JOBS) VARIANT=asan all tests-c
	@+$(MAKE) --no-print-directory $(JOBS) VARIANT=tsan $(TSAN_BIN)
	@tests/run c

test: deps ## everything: packages, release and sanitizer builds, all tests
	@+$(MAKE) --no-print-directory $(JOBS) all
	@+$(MAKE) --no-print-directory $(JOBS) VARIANT=asan all tests-c
	@+$(MAKE) --no-print-directory $(JOBS) VARIANT=tsan $(TSAN_BIN)
	@KNOWN_FEATURES="$(KNOWN_FEATURES)" tests/run

net-mutation: deps ## each attack on the firewall against a filter without the rule that stops it: all red
	@+$(MAKE) --no-print-directory $(JOBS) all $(B)/tests/test_net_attacks
	@$(B)/tests/test_net_attacks --mutate

check-layers: all ## rooms use what is below them, each library has one user, no state of the process
	@KNOWN_FEATURES="$(KNOWN_FEATURES)" tests/check-layers $(B)

# Generated code aside: all C of the tree.
C_FILES = $(shell git ls-files '*.c' '*.h')
.PHONY: format format-check
format: DEPS_FOR = format
format: deps ## lay out the C files as .clang-format says
	@clang-format -i $(C_FILES)
format-check: DEPS_FOR = format
format-check: deps ## fail where a C file is laid out otherwise, or a line is over 100 columns
	@clang-format --dry-run --Werror $(C_FILES)
	@! LC_ALL=C.UTF-8 grep -nE '^.{101}' $(C_FILES)

.SECONDARY: $(FUZZ_BIN)
FUZZ_SECONDS ?= 20
fuzz: DEPS_FOR = run build fuzz
fuzz: deps ## run each fuzz target for FUZZ_SECONDS
	@+$(MAKE) --no-print-directory $(JOBS) VARIANT=fuzz $(FUZZ_BIN:%=%.ran)

build/fuzz/fuzz_%.ran: build/fuzz/fuzz_% FORCE
	@mkdir -p build/fuzz/corpus/$*; echo "  FUZZ $*"; \
	$< -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -verbosity=0 -artifact_prefix=build/fuzz/$*- \
	    build/fuzz/corpus/$* $$(ls -d tests/fuzz/corpus/$* 2>/dev/null) 2>build/fuzz/$*.log || { cat build/fuzz/$*.log; exit 1; }

# The official test suite of JSON Schema, from the source package of python's jsonschema, which carries it.
SUITE := jsonschema-4.26.0
SUITE_SHA256 := 0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326
build/$(SUITE):
	@mkdir -p build
	@python3 -m pip download -q --no-deps --no-binary jsonschema -d build $(subst -,==,$(SUITE))
	@echo "$(SUITE_SHA256)  $@.tar.gz" | sha256sum -c --quiet
	@tar -xzf $@.tar.gz -C build

.PHONY: schema-suite
schema-suite: DEPS_FOR = run build suite
schema-suite: deps build/$(SUITE) ## the official JSON Schema test suite, the cases required of 2020-12
	@+$(MAKE) --no-print-directory $(JOBS) all
	@$(B)/orch tests/conformance/schema.lua build/$(SUITE)/json

bench: DEPS_FOR = run build demo test
bench: deps ## measure: MCP over stdio, clones, packets, 1,000 calls; prints machine, method, figures and targets (4 minutes)
	@+$(MAKE) --no-print-directory $(JOBS) all $(patsubst tests/bench/%.c,$(B)/tests/bench/%,$(wildcard tests/bench/*.c))
	@tests/bench/run $(B)

.PHONY: conformance
conformance: all ## the official MCP conformance suite (from npm), all sets
	@command -v npm >/dev/null || $(MAKE) --no-print-directory deps DEPS_FOR=conformance
	@tests/conformance/run $(B)

.PHONY: peers
peers: ## real MCP SDKs (TypeScript, Python, Go, Rust), server-everything, the inspector and agents (Claude Code, Codex) against orch
	@+$(MAKE) --no-print-directory $(JOBS) all
	@command -v npm >/dev/null && command -v cargo >/dev/null && command -v qemu-system-x86_64 >/dev/null && \
	    python3 -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory deps DEPS_FOR="run conformance suite peers"
	@tests/peers/run $(B)

demo: DEPS_FOR = run build demo
demo: deps ## packages, build, then a real MCP session with a microVM, message by message
	@+$(MAKE) --no-print-directory $(JOBS) all
	@python3 examples/demo.py $(B)/orch

-include $(shell find build -name '*.d' 2>/dev/null)

.PHONY: clean
clean: ## remove what was built
	rm -rf build

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16
	@echo; echo "FEATURES=\"$(KNOWN_FEATURES)\"  VARIANT=release|asan|fuzz  PREFIX=$(PREFIX)  DESTDIR=  V=1"
