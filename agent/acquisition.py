"""The bases a job needs: kernel, ramdisk and root, resolved, fetched and pinned by it."""

from collections.abc import Mapping

from agent.base import Base, check_fits
from agent.cancellation import Cancellation
from agent.errors import InvalidJob
from agent.host import Host
from agent.image import Image, require_active
from agent.job import ImageRef, ImagesType
from agent.origin import Origin
from agent.recorder import Recorder
from agent.report import ImageReport, Progress, Role


class Acquisition:
    """Of one job; used by one thread."""

    def __init__(self, host: Host, recorder: Recorder, cancellation: Cancellation) -> None:
        self._host = host
        self._recorder = recorder
        self._cancellation = cancellation
        self._pin = recorder.report.id
        self._trusted: tuple[str, ...] = ()

    def resolve(self, wanted: ImageRef) -> dict[Role, Image]:
        """Return the images of kernel, ramdisk and root, in the order they are fetched.

        What `wanted` says of signatures counts for all of them.

        Raises:
            InvalidJob: there is a ramdisk without a kernel.
            ImageError: as the source says it.
        """
        cache = self._host.image_cache
        self._trusted = wanted.trusted_certificates
        root = cache.resolve(wanted.id, self._cancellation)
        require_active(root)
        images = {}
        for role, image_id in (
            (Role.KERNEL, wanted.kernel_id or root.kernel_id),
            (Role.RAMDISK, wanted.ramdisk_id or root.ramdisk_id),
        ):
            if image_id is not None:
                images[role] = cache.resolve(image_id, self._cancellation)
                require_active(images[role])
        if Role.RAMDISK in images and Role.KERNEL not in images:
            raise InvalidJob(
                f"image {root.id} comes with a ramdisk but without a kernel",
                "give image.kernel_id, or set the property kernel_id of the image",
            )
        return {**images, Role.ROOT: root}

    def resolve_again(self, origin: Origin) -> dict[Role, Image]:
        """Return the images that an earlier run has found, in the order they are fetched.

        Raises:
            ImageError: as the source says it.
        """
        self._trusted = origin.trusted_certificates
        images = {}
        for role, image_id in (
            (Role.KERNEL, origin.kernel),
            (Role.RAMDISK, origin.ramdisk),
            (Role.ROOT, origin.root),
        ):
            if image_id is not None:
                images[role] = self._host.image_cache.resolve(image_id, self._cancellation)
                require_active(images[role])
        return images

    def acquire(
        self,
        images: Mapping[Role, Image],
        *,
        images_type: ImagesType,
        max_virtual_size: int | None,
    ) -> dict[Role, Base]:
        """Return the bases, pinned until `release`, and count that as their last use.

        The root's may be one that the backend for `images_type` has already. It is noted
        in the job's record.
        `max_virtual_size`: bytes, what the root disk will hold; None for any.

        Raises:
            BootwrightError: as `ImageCache.acquire`.
        """
        bases: dict[Role, Base] = {}
        for role, image in images.items():
            if role is Role.ROOT:
                backend = self._host.backends[images_type]
                # What nobody reads nobody can say to be signed.
                direct = None if self._trusted else backend.direct(image, self._cancellation)
                if direct is not None:
                    check_fits(image, direct.virtual_size, max_virtual_size)
                bases[role] = direct or self._acquire(role, image, max_virtual_size)
            else:
                bases[role] = self._acquire(role, image, None)
        root = bases[Role.ROOT]
        self._recorder.note(
            image=ImageReport(id=root.image.id, digest=root.digest, source=root.origin)
        )
        return bases

    def _acquire(self, role: Role, image: Image, max_virtual_size: int | None) -> Base:
        def show(progress: Progress) -> None:
            self._recorder.progress(progress.model_copy(update={"role": role}))

        base = self._host.image_cache.acquire(
            image,
            pin=self._pin,
            max_virtual_size=max_virtual_size,
            trusted=self._trusted,
            cancellation=self._cancellation,
            on_progress=show,
        )
        self._recorder.count(received=base.received, resumed=base.resumed)
        self._host.touch(base.name)
        return base

    def release(self) -> None:
        """Give up the pins: from here on `instance.json` says what is in use."""
        self._host.image_cache.unpin(self._pin)
