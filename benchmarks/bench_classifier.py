"""classifier."""

from deit_fast.kernels import classifier, classifier_reference
from deit_fast.kernels.cases import classifier_inputs


def test_classifier(compare):
    def reads(arguments):  # of each image's tokens, the two prefix tokens
        return {"x": arguments["x"][:, :2]}

    compare(classifier, classifier_reference, classifier_inputs, reads=reads)
