"""classifier."""

from deit_fast.kernels import classifier, classifier_reference
from deit_fast.kernels.cases import classifier_inputs


def test_classifier(race):
    race(classifier, classifier_reference, classifier_inputs)
