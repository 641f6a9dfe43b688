"""Reads TensorBoard's event files like TensorBoard, without the package (writing does not need it either)."""

import struct


def events(workdir):
    """All events that TensorBoard would show, in order: a start of a run hides those of its later steps before it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4  # a length, its checksum, the event, its checksum
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = [old for old in shown if old.step < event.step]
            shown.append(event)
    return shown


def scalars(workdir):
    """{name: [(step, value)]}."""
    found = {}
    for event in events(workdir):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def images(workdir):
    """[(step, name)] of the images, each checked to be a PNG of the size it says."""
    import io

    from PIL import Image

    found = []
    for event in events(workdir):
        for value in event.summary.value:
            if value.HasField("image"):
                with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
                    assert image.size == (value.image.width, value.image.height)
                found.append((event.step, value.tag))
    return found
