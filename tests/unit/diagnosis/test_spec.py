import pytest

from qdm_lightning.diagnosis.spec import DiagnosisConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 1}, "num_images=1"),
        ({"timesteps": 1}, "timesteps=1"),
        ({"points": 1}, "points=1"),
        ({"layers": []}, "shows nothing"),
        ({"network": "pupil"}, "network=pupil is not allowed"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiagnosisConfig(**settings)
