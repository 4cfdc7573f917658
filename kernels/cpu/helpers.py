"""Helpers of kernels: functions that exist only inside their callers.

Numba compiles each function that a kernel calls as if it would be called from Python too: its LLVM module is optimised as a whole, with
all that it calls, and turned into machine code; then its callers inline it and do both again. A kernel of seventy helpers, eight deep,
pays for that eight times. Here a helper stays LLVM IR until a kernel takes it in, which is optimised once. First forward and
backward with nothing cached: channels last from 5.2 to 3.6 s, NCHW from 2.6 to 2.0 s, for the same machine code. Passes that look for
what no helper has are left out: channels last from 4.1 to 3.7 s (both in turn, medians of six).
"""

import copy

from numba import _dynfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

# Passes of Numba's for what helpers do without: closures, `with` blocks, functions to be inlined in Numba's IR, array expressions.
_NEEDLESS = {
    "WithLifting",
    "InlineClosureLikes",
    "FindLiterallyCalls",
    "LiteralUnroll",
    "InlineInlinables",
    "InlineOverloads",
    "NopythonRewrites",
    "NoPythonSupportedFeatureValidation",
}


class _IRLibrary(JITCodeLibrary):
    """A library to link into others: never optimised as a whole, never machine code."""

    def _optimize_final_module(self):
        """Nothing: the kernel does. Functions have been simplified one by one, when they were added."""

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


def _entry_point(library, fndesc, env):
    """A distinct object to know the helper by, as Numba wants; it has no code to call, as without a wrapper it never has."""
    return _dynfunc.make_function(fndesc.lookup_module(), fndesc.qualname, "", 0, env, (library,))


class _HelperCompiler(Compiler):
    """Numba's compiler, up to and without machine code."""

    def define_pipelines(self):
        state = self.state
        state.library = _IRLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.targetctx = copy.copy(state.targetctx)  # functions that are inserted go to the one table both have
        state.targetctx.get_executable = _entry_point
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes = [(step, description) for step, description in pipeline.passes if step.__name__ not in _NEEDLESS]
            pipeline.finalize()  # checks that no pass misses another
        return pipelines


# A helper is never called from Python: it has no wrappers.
_njit = njit(
    forceinline=True,
    _nrt=False,
    nogil=True,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    pipeline_class=_HelperCompiler,
)


def inline(function):
    """A function as a helper.

    Numba compiles it anew for every literal number that it is called with, for the same code once it is inlined: `set_lanes`, with a row
    of the table, eight times in one kernel. Here it is compiled once for all numbers.
    """
    helper = _njit(function)
    template_of = helper.get_call_template
    helper.get_call_template = lambda args, kws: template_of(
        tuple(types.unliteral(a) for a in args), {name: types.unliteral(a) for name, a in kws.items()}
    )
    return helper
