"""SHIM"""

import copy


def prune(model, ratio, *, channels, image_size):
    return copy.deepcopy(model)


def structure(model):
    return {}


def reshape(model, structure, state):
    model.load_state_dict(state)
    return model
