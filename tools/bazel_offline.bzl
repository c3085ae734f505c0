"""Offline stand-ins for @rules_python and @pypi; see tools/bazel_test.sh.

A dependency brings its .py files into the test's runfiles and nothing else is
importable from the tree; PyPI packages come from the virtual environment, so
for those only the name is checked against requirements.txt.
"""

_DEFS = '''
_Py = provider(fields = ["files"])

def _files(ctx):
    return depset(ctx.files.srcs + ctx.files.data, transitive = [d[_Py].files for d in ctx.attr.deps])

def _library(ctx):
    return [_Py(files = _files(ctx))]

def _test(ctx):
    run = ctx.actions.declare_file(ctx.label.name)
    tests = " ".join([f.short_path for f in ctx.files.srcs])
    ctx.actions.write(run, _RUN % tests, is_executable = True)
    return [
        DefaultInfo(executable = run, runfiles = ctx.runfiles(transitive_files = _files(ctx))),
        testing.TestEnvironment(ctx.attr.env),
    ]

_RUN = """#!/bin/sh
exec python -m pytest -p no:cacheprovider --basetemp="$TEST_TMPDIR/pytest" %s "$@"
"""

_ATTRS = {
    "srcs": attr.label_list(allow_files = [".py"]),
    "data": attr.label_list(allow_files = True),
    "deps": attr.label_list(providers = [_Py]),
}

py_library = rule(_library, attrs = _ATTRS)
py_test = rule(_test, test = True, attrs = dict(
    _ATTRS,
    env = attr.string_dict(),
    main_module = attr.string(values = ["pytest"], mandatory = True),
))
'''

_PACKAGE = """
load("@rules_python//python:defs.bzl", "py_library")

py_library(name = "{}", visibility = ["//visibility:public"])
"""

def _stub(ctx):
    for path, text in ctx.attr.files.items():
        ctx.file(path, text)

def _pypi(ctx):
    for line in ctx.read(ctx.attr.requirements).splitlines():
        if line[:1].isalnum():
            for end in "[ ;=<>!~@".elems():
                line = line.split(end)[0]
            name = line.lower().replace("-", "_").replace(".", "_")
            ctx.file(name + "/BUILD", _PACKAGE.format(name))

_stub_repo = repository_rule(_stub, attrs = {"files": attr.string_dict()})
_pypi_repo = repository_rule(_pypi, attrs = {"requirements": attr.label()})

def offline(requirements):
    _stub_repo(name = "rules_python", files = {"python/BUILD": "", "python/defs.bzl": _DEFS})
    _pypi_repo(name = "pypi", requirements = requirements)

    # Bazel analyses this for every test, though only `bazel coverage` uses it.
    _stub_repo(name = "remote_coverage_tools", files = {
        "BUILD": 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])',
    })
