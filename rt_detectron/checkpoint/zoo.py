"""``robust://NAME.pkl``: converted backbones by name, from a local folder."""

import os

from iopath.common.file_io import PathHandler

from rt_detectron.errors import InputError


class RobustPathHandler(PathHandler):
    """Finds ``robust://NAME.pkl`` as ``NAME.pkl`` in the folder ``$RT_DETECTRON_ZOO``."""

    PREFIX = "robust://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        name = path.removeprefix(self.PREFIX)
        folder = os.environ.get("RT_DETECTRON_ZOO", "")
        local = os.path.join(folder, name)
        if folder and os.path.isfile(local):
            return local
        checkpoint = f"{name.removesuffix('.pkl')}.ckpt"
        problem = f"no {name} in {folder}" if folder else "RT_DETECTRON_ZOO is not set"
        raise InputError(
            f"{path}: {problem}; download {checkpoint} from madrylab/robust-imagenet-models on the Hugging "
            f"Face Hub, then run tools/convert_checkpoint.py {checkpoint} FOLDER/{name} and export "
            "RT_DETECTRON_ZOO=FOLDER"
        )

    def _isfile(self, path: str, **kwargs) -> bool:
        try:
            return os.path.isfile(self._get_local_path(path))
        except InputError:
            return False

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        if mode not in ("r", "rb"):
            raise InputError(f"{path}: the zoo is read-only")
        return open(self._get_local_path(path), mode, buffering)
