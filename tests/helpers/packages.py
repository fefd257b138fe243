"""A backend whose packages are Python functions: all that is native but the machine code, which is slow to compile."""

import importlib
from unittest import mock

from mlopt.backends import EagerBackend, Lowering
from mlopt.backends.eager import EagerGraph
from mlopt.backends.inductor.cache import Entry
from mlopt.backends.inductor.interface import cut_interface
from mlopt.backends.inductor.lowered import LoweredGraph
from mlopt.backends.inductor.spec import UnsupportedGraphError


class PackageBackend(EagerBackend):
    """Makes what the Inductor backend makes, with the graph, run by torch calls, in place of its package.

    Attributes:
        before: Called with the tensors that a package is given.
    """

    name = "packages"
    compiles = True

    def __init__(self):
        self.before = lambda inputs: None

    def lower(self, module):
        try:
            spec, plan = cut_interface(module)
        except UnsupportedGraphError as error:
            return EagerGraph(module, str(error))
        forward = spec.rebuild()[0].forward

        def body(inputs):
            self.before(inputs)
            return [*forward(*inputs)]

        extension = importlib.import_module("mlopt._C")
        with mock.patch.object(extension, "Package", lambda path, *kinds, make=extension.Package: make(body, *kinds)):
            return LoweredGraph(spec, plan, Entry("", (), 0.0), EagerGraph(module), Lowering("packages"))
