"""What setup.cfg cannot say: a wheel carries the experiment files and the small trained parts inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExperiments(build_py):
    """Copies ``experiments`` to ``umm_zoo/shipped``, for ``umm_zoo:llava/shapes.yaml``; an editable one reads in place."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        source, target = Path("experiments"), Path(self.build_lib, "umm_zoo", "shipped")
        for file in sorted(source.rglob("*")) if not self.editable_mode else ():
            if file.is_file() and (file.suffix == ".yaml" or file.is_relative_to(source / "tiny" / "weights")):
                place = target / file.relative_to(source)
                self.mkpath(str(place.parent))
                self.copy_file(str(file), str(place))


setup(cmdclass={"build_py": BuildWithExperiments})
