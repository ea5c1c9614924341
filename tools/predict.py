#!/usr/bin/env python
"""Find objects in photos and videos.

    python tools/predict.py --weights output/demo --input photo.jpg more/*.png --output output/found
    python tools/predict.py --weights a.pth --config-file table2a_backbone/r50_fpn --input photos
    python tools/predict.py --weights output/demo --video-input film.mp4 --output output/film
    python tools/predict.py --weights output/demo --webcam

Writes to --output: pictures/, or a video for a video, with the detections that score at least
--confidence-threshold, and predictions.json with all of them, in COCO's results format with
"file_name" and "category_name" added. `eval.py --predictions` scores it on the same photos. Photos
that cannot be read are skipped, with a line that says why.

The exit code is 0 if anything could be read, 1 if nothing could, and 2 for a mistake in the
arguments.
"""

import argparse
import glob
import os
import sys
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import Predictor, get_config  # isort: split

import cv2
import numpy as np
from detectron2.utils.video_visualizer import VideoVisualizer
from PIL import Image
from tqdm import tqdm

from mask_rcnn_plugin.data.mapper import ImageError
from mask_rcnn_plugin.errors import UserError, counted, mistakes_in_one_line
from mask_rcnn_plugin.evaluation.pictures import hide_keypoints
from mask_rcnn_plugin.evaluation.predictions import write_json
from mask_rcnn_plugin.inference.predictor import find_config, find_weights
from mask_rcnn_plugin.inference.result import Result

Image.init()
SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def photos(inputs: list[str], argument: str = "--input") -> list[str]:
    """Files that the arguments name: files, globs and folders, which are searched recursively.

    Raises:
        UserError: for an argument that gives no image.
    """
    files: list[str] = []
    for given in inputs:
        if os.path.isdir(given):
            found = [str(p) for p in sorted(Path(given).rglob("*")) if p.suffix.lower() in SUFFIXES]
        else:
            found = [given] if os.path.isfile(given) else sorted(glob.glob(given, recursive=True))
        if not found:
            raise UserError(f"{argument} {given!r}: not a file, and no images found")
        files += found
    return list(dict.fromkeys(files))


def results_of(predictor: Predictor, files: list[str]) -> Iterator[Result]:
    """Results of a batch, without the files that cannot be read, which are reported."""
    try:
        yield from predictor(files, batch_size=len(files))
    except ImageError as error:
        if len(files) > 1:  # which of them
            yield from chain(*(results_of(predictor, [file]) for file in files))
        else:
            tqdm.write(f"skipped {str(error).removeprefix('image ')}", file=sys.stderr)


def predict_photos(
    predictor: Predictor, files: list[str], folder: Path, batch_size: int, threshold: float
) -> Iterator[tuple[str, Result]]:
    """Draw each photo, and give its name and what is found; a picture that cannot be drawn or
    written is reported in a line."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    written: set[str] = set()
    with tqdm(total=len(files), unit="image", disable=None) as bar:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            for result in results_of(predictor, batch):
                name = os.path.relpath(str(result.file), root)
                picture = str(Path(name).with_suffix(".jpg"))
                if picture in written:  # of another image, a.png beside a.jpg
                    picture = f"{name}.jpg"
                written.add(picture)
                try:
                    result.save(folder / picture, threshold)
                except UserError as error:
                    tqdm.write(str(error), file=sys.stderr)
                yield Path(name).as_posix(), result
            bar.update(len(batch))


def open_video(source: str | int) -> cv2.VideoCapture:
    """
    Args:
        source: a file, or the number of a camera.

    Raises:
        UserError: if it cannot be opened.
    """
    video = cv2.VideoCapture(source)
    if not video.isOpened():
        what = f"--video-input {source!r}" if isinstance(source, str) else f"camera {source}"
        raise UserError(f"{what} cannot be opened")
    return video


def predict_video(
    predictor: Predictor, video: cv2.VideoCapture, file: Path, threshold: float
) -> Iterator[tuple[str, Result]]:
    """Write a video, and give each frame's name, such as "film.mp4#000012", and what is found.

    Raises:
        UserError: at once, if the file cannot be written.
    """
    size = int(video.get(cv2.CAP_PROP_FRAME_WIDTH)), int(video.get(cv2.CAP_PROP_FRAME_HEIGHT))
    rate = video.get(cv2.CAP_PROP_FPS) or 10.0
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise UserError(f"{file} cannot be written: this OpenCV has no encoder for mp4")
    return frames_of(predictor, video, writer, size, file.name, threshold)


def frames_of(
    predictor: Predictor, video: cv2.VideoCapture, writer: cv2.VideoWriter,
    size: tuple[int, int], name: str, threshold: float,
) -> Iterator[tuple[str, Result]]:  # fmt: skip
    """What `predict_video` gives, frame by frame."""
    visualizer = VideoVisualizer(predictor.metadata)
    frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    with tqdm(total=frames if frames > 0 else None, unit="frame", disable=None) as bar:
        try:
            for number in count(1):
                more, frame = video.read()
                if not more:
                    break
                result = predictor(frame)
                shown = hide_keypoints(result.above(threshold).instances, predictor.metadata)
                pixels = np.ascontiguousarray(frame[:, :, ::-1])
                picture = visualizer.draw_instance_predictions(pixels, shown).get_image()
                writer.write(cv2.resize(picture[:, :, ::-1], size))
                yield f"{name}#{number:06d}", result
                bar.update()
        finally:
            video.release()
            writer.release()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model it is."""
    parser.add_argument(
        "--weights",
        required=True,
        help="a training's output folder, a file, a detectron2:// address or a model-zoo name",
    )
    parser.add_argument(
        "--config-file", dest="config", help="default: the config.yaml beside the weights"
    )


def parse_with_files(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse changes to the config too, which argparse takes for files if they follow --NAME."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_intermixed_args()
    given = getattr(args, name) or []
    changes = [x for x in given if "=" in x and not os.path.exists(x)]
    args.overrides += changes
    setattr(args, name, [x for x in given if x not in changes])
    if given == changes != []:
        parser.error(f"--{name} has no file, only changes to the config: {' '.join(changes)}")
    return args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="FILE", help="images, folders of them, or patterns: '*.jpg'"
    )
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera, until Ctrl-C")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/predictions"),
        metavar="DIR",
        help="default: output/predictions",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="lowest score that is drawn (default: 0.5)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images per call of the model (default: 1)"
    )
    parser.add_argument(
        "--no-optimize",
        action="store_true",
        help="run the model as trained, without optimize_for_inference",
    )
    args = parse_with_files(parser, "input")
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}, must be 1 or more")
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold is {args.confidence_threshold}, must be from 0 to 1")
    return args


def numbered(
    results: Iterator[tuple[str, Result]], scores: list[list[float]]
) -> Iterator[list[dict[str, Any]]]:
    """What is found, in COCO's format, images numbered from 1; `scores` gets those of each."""
    for image_id, (name, result) in enumerate(results, 1):
        scores.append(result.scores)
        yield [{**found, "file_name": name} for found in result.to_coco(image_id)]


def summary(images: list[list[float]], threshold: float) -> str:
    scores = list(chain(*images))
    text = f"{len(scores)} detections in {counted(len(images), 'image', 'images')}"
    if scores and max(scores) < threshold:
        return (
            f"{text}\nnothing reaches --confidence-threshold {threshold}: the best score is "
            f"{max(scores):.3f}"
        )
    return f"{text}, {sum(s >= threshold for s in scores)} with a score of {threshold} or more"


def run(args: argparse.Namespace) -> bool:
    """Whether anything could be read."""
    weights = find_weights(args.weights)
    cfg = get_config(args.config or find_config(weights), args.overrides)
    files = photos(args.input)
    video = None if files else open_video(0 if args.webcam else args.video_input)
    predictor = Predictor.from_config(cfg, weights, optimize=not args.no_optimize)
    names = predictor.names
    print(f"{weights}: {counted(len(names), 'class', 'classes')}: {', '.join(names)}")

    output, threshold = args.output, args.confidence_threshold
    drawn = output / "pictures"
    if video:
        drawn = output / f"{'webcam' if args.webcam else Path(args.video_input).stem}.mp4"
    for read in map(Path, [args.video_input] if args.video_input else files):
        if drawn.resolve() in (read.resolve(), *read.resolve().parents):
            raise UserError(f"{read} is where the pictures would be written: give another --output")
    if drawn.is_dir() and any(drawn.iterdir()):
        print(f"{drawn} has pictures already: those of the same names are replaced, others stay")
    output.mkdir(parents=True, exist_ok=True)
    if video:
        results = predict_video(predictor, video, drawn, threshold)
    else:
        results = predict_photos(predictor, files, drawn, args.batch_size, threshold)
    scores: list[list[float]] = []
    predictions = output / "predictions.json"
    try:
        with predictions.open("w") as file:
            write_json(file, numbered(results, scores))
    except KeyboardInterrupt:  # what is done already is kept
        print("interrupted", file=sys.stderr)
    print(summary(scores, threshold))
    limit = cfg.dataset.test.max_detections
    shown = [of_image for of_image in scores if min(of_image, default=0) >= threshold]
    if full := sum(len(of_image) >= limit for of_image in shown):
        what = f"{counted(full, 'image', 'images')} with {limit} detections"
        print(f"{what}, as many as dataset.test.max_detections allows: raise it to find more")
    if len(scores) < len(files):
        print(f"skipped {len(files) - len(scores)} of {len(files)} files")
    print(f"{drawn}, {predictions}")
    return bool(scores)


def main() -> None:
    with mistakes_in_one_line():
        sys.exit(0 if run(parse_args()) else 1)


if __name__ == "__main__":
    main()
