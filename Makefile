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
# One set of environments for each checkout: two of them do not get in each other's way.
CHECKOUT := $(shell pwd | sha256sum | cut -c1-12)
TOOLS := $(BOOTWRIGHT_CACHE)/tools
VENV := $(BOOTWRIGHT_CACHE)/venv-$(CHECKOUT)
TOX_WORK := $(BOOTWRIGHT_CACHE)/tox-$(CHECKOUT)
# setuptools builds in the checkout and forgets nothing: a module that is gone would ship from there.
CLEAN_BUILD := rm -rf build
# tox would make its directory for root alone.
TOX := $(CLEAN_BUILD) && install -d -m 755 $(TOX_WORK) && $(TOOLS)/bin/tox run --workdir $(TOX_WORK)
PACKAGES := $(BOOTWRIGHT_CACHE)/packages-$(shell sha256sum bindep.txt | cut -c1-12)
SOURCES := $(shell find agent privsep -name '*.py') pyproject.toml setup.py

APT_LOG := $(BOOTWRIGHT_CACHE)/apt.log
APT := DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qy
# $(call apt,arguments): silent, unless it fails.
apt = $(APT) $(1) >$(APT_LOG) 2>&1 || { tail -20 $(APT_LOG); echo "apt-get failed, see $(APT_LOG)"; exit 1; }

.PHONY: help demo test lint types unit functional docs clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

demo: $(PACKAGES) $(VENV)/.installed
	@$(VENV)/bin/python -m functional.demo

test: $(PACKAGES) $(TOOLS)/.installed
	@$(TOX) -e lint,types,py311,functional
	@echo "make test: lint, types, unit and functional tests passed"

lint types: $(PACKAGES) $(TOOLS)/.installed
	@$(TOX) -e $@

unit: $(PACKAGES) $(TOOLS)/.installed
	@$(TOX) -e py311

functional: $(PACKAGES) $(TOOLS)/.installed
	@$(TOX) -e functional

docs: $(PACKAGES) $(TOOLS)/.installed
	@$(TOX) -e docs

# Debian packages. bindep itself comes from a virtualenv, which needs python3-venv. The package
# lists are fetched even if nothing is missing: the guest's kernel is downloaded by them.
$(PACKAGES): bindep.txt | $(TOOLS)/.installed
	@$(call apt,update)
	@missing=$$($(TOOLS)/bin/bindep --brief --file bindep.txt compile test || true); \
	if [ -n "$$missing" ]; then \
	    echo "installing $$(wc -w <<<"$$missing") Debian packages"; \
	    $(call apt,install --no-install-recommends $$missing); \
	fi
	@touch $@

$(TOOLS)/.installed: tools.txt
	@install -d -m 755 $(BOOTWRIGHT_CACHE)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "installing python3-venv"; \
	    $(call apt,update); \
	    $(call apt,install --no-install-recommends python3 python3-venv); }
	@$(PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/pip install -qq --disable-pip-version-check -r tools.txt
	@touch $@

$(VENV)/bin/python: $(PACKAGES)
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/bin/python
	@echo "installing bootwright into a virtualenv"
	@$(CLEAN_BUILD)
	@$(VENV)/bin/pip install -qq --disable-pip-version-check .
	@touch $@

clean:
	rm -rf $(VENV) $(TOX_WORK) build *.egg-info
