# Two commands do all the set-up on a fresh Debian 12 machine, as root:
#
#   make demo   boot a tiny real guest through the agent and show its console
#   make test   lint, types, unit and functional tests
#
# What they make stays in $(BOOTWRIGHT_CACHE), so that a second run installs nothing. It
# lies outside of the checkout because the user `bootwright` has to be able to
# read it, and a checkout below /root cannot be read by anybody else.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON := /usr/bin/python3
export BOOTWRIGHT_CACHE ?= /var/cache/bootwright-dev
# Checkouts do not get in each other's way: each has environments of its own. What they
# share is named after the content it is made from, and never made again under that name.
name_of = $(shell $(1) | sha256sum | cut -c1-12)
CHECKOUT := $(call name_of,pwd)
TOOLS := $(BOOTWRIGHT_CACHE)/tools-$(call name_of,cat tools.txt)
PACKAGES := $(BOOTWRIGHT_CACHE)/packages-$(call name_of,cat bindep.txt)
VENV := $(BOOTWRIGHT_CACHE)/venv-$(CHECKOUT)
TOX_WORK := $(BOOTWRIGHT_CACHE)/tox-$(CHECKOUT)
# setuptools builds in the checkout and forgets nothing: a module that is gone would ship from there.
CLEAN_BUILD := rm -rf build
# tox would make its directory for root alone.
TOX := $(CLEAN_BUILD) && install -d -m 755 $(TOX_WORK) && $(TOOLS)/bin/tox run --workdir $(TOX_WORK)
# Named after all that is installed, so that a module that is gone goes there as well.
INSTALLED := $(VENV)/.installed-$(call name_of,find agent privsep pyproject.toml setup.py \
    -type f -not -path '*/__pycache__/*' | LC_ALL=C sort | xargs sha256sum)

APT_LOG := $(BOOTWRIGHT_CACHE)/apt-$(CHECKOUT).log
APT := DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qy
# $(call apt,arguments): silent, unless it fails.
apt = $(APT) $(1) >$(APT_LOG) 2>&1 || { tail -20 $(APT_LOG); echo "apt-get failed, see $(APT_LOG)"; exit 1; }

.PHONY: help root demo test lint types unit functional campaign docs clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

root:
	@[ "$$(id -u)" = 0 ] || { echo "run it as root: it starts libvirtd and becomes other users"; exit 1; }

demo: | root $(PACKAGES) $(INSTALLED)
	@$(VENV)/bin/python -m functional.demo

test: | root $(PACKAGES)
	@$(TOX) -e lint,types,py311,functional
	@echo "make test: lint, types, unit and functional tests passed"

lint types docs: | $(PACKAGES)
	@$(TOX) -e $@

# ARGS="-k interrupted", for example, goes to pytest.
unit: | $(PACKAGES)
	@$(TOX) -e py311 -- tests $(ARGS)

functional: | root $(PACKAGES)
	@$(TOX) -e functional -- functional $(ARGS)

# An hour or two. ARGS="-k twin", for example, is a part of it.
campaign: export BOOTWRIGHT_CAMPAIGN := whole
campaign: | root $(PACKAGES)
	@$(TOX) -e functional -- functional/test_campaign.py $(ARGS)

# Debian packages. bindep itself comes from a virtualenv, which needs python3-venv. The package
# lists are fetched even if nothing is missing: the guest's kernel is downloaded by them.
# bindep has the same exit status for missing packages as for a defect of its own.
$(PACKAGES): | $(TOOLS)/.installed
	@$(call apt,update)
	@missing=$$($(TOOLS)/bin/bindep --brief --file bindep.txt compile test) \
	    || ! grep -qvxE '[a-z0-9][a-z0-9+.-]+' <<<"$$missing" \
	    || { echo "bindep failed, see above"; exit 1; }; \
	if [ -n "$$missing" ]; then \
	    echo "installing $$(wc -w <<<"$$missing") Debian packages and what they need (some 250 MB, a few minutes)"; \
	    $(call apt,install --no-install-recommends $$missing); \
	fi
	@touch $@

$(TOOLS)/.installed:
	@install -d -m 755 $(BOOTWRIGHT_CACHE)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "installing python3-venv"; \
	    $(call apt,update); \
	    $(call apt,install --no-install-recommends python3 python3-venv); }
	@exec 9>$(TOOLS).lock; flock 9; \
	if [ ! -e $@ ]; then \
	    $(PYTHON) -m venv --clear $(TOOLS); \
	    $(TOOLS)/bin/pip install -qq --disable-pip-version-check -r tools.txt; \
	    touch $@; \
	fi

# pip is the last thing that comes into it.
$(VENV)/bin/pip: | $(PACKAGES)
	@$(PYTHON) -m venv --clear $(VENV)

$(INSTALLED): | $(VENV)/bin/pip
	@echo "installing bootwright into a virtualenv (a minute or two)"
	@rm -f $(VENV)/.installed*
	@$(CLEAN_BUILD)
	@$(VENV)/bin/pip install -qq --disable-pip-version-check .
	@touch $@

clean:
	rm -rf $(VENV) $(TOX_WORK) build *.egg-info
