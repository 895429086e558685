"""The judge: recognises the objects of a picture from its pixels alone.

Connected pixels that differ from the background are a segment. In its place every shape is drawn,
in the size whose area is nearest. The best drawing names the object, if its error is small. Last,
the whole scene is drawn; if the picture differs from that, it has one more object, an unknown one.

A picture shows a scene "exactly" if it differs by less than the tolerances below. These were chosen
from 6,000 pictures after the round trip of the VAE in weights/ at 128x128: 99.9 % of them, or of
their objects, keep each one. A picture passes in spite of

* any fault that differs by less than 20 levels from what should be there;
* faults within two pixels of an edge, if they leave the shape's error small: bites and bumps of
  two pixels, a radius that is two percent too large or too small, a little blur;
* outlines whose colour differs by up to 45 levels.

Tests in tests/test_shapes.py plant faults on both sides of these limits.
"""

import math
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F

from world import shapes
from world.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, STYLES, Object, Scene

# Colours differ by the distance of their 8-bit RGB values, in levels. In brackets: 99.9 % of
# pictures or objects differ by less after the VAE's round trip.
NOT_BACKGROUND = 45.0  # from here on a pixel belongs to a segment
COLOUR_TOLERANCE = {"filled": 20.0, "outlined": 45.0}  # of an object from the palette (5 and 25)
BACKGROUND_TOLERANCE = 20.0  # (0)
SHAPE_TOLERANCE = {"filled": 0.04, "outlined": 0.10}  # squared error by energy (0.029 and 0.081)
DIFFERENCE = 20.0  # of a pixel that is more than EDGE pixels from all edges of the drawing (18)
EDGE = 2
SMALLEST = 8e-4    # segments with a smaller share of the picture are noise


class Segments(NamedTuple):
    """B pictures and the O segments in them."""
    rgb: torch.Tensor         # (B, 3, H, W), from 0 to 255
    background: torch.Tensor  # (B, 3)
    label: torch.Tensor       # (B, H, W), of each pixel; -1 is background
    picture: torch.Tensor     # (O,), index of the picture that has the segment
    root: torch.Tensor        # (O,), label of the segment


class Windows(NamedTuple):
    """A window of P x P pixels around each of O segments, at offsets from (x, y)."""
    pixels: torch.Tensor   # (O, P, P, 3)
    label: torch.Tensor    # (O, P, P); -1 is background, -2 outside the picture
    segment: torch.Tensor  # (O, P, P), True in the window's own segment
    paper: torch.Tensor    # (O, 1, 1, 3), the colour of the background
    x: torch.Tensor        # (O,)
    y: torch.Tensor        # (O,)
    offset: torch.Tensor   # (P,)


@torch.no_grad()
def judge(pictures):
    """Return the Scene that each of the pictures (B, 3, H, W) in [-1, 1] shows."""
    scenes = []
    for part in pictures.split(64):  # to limit memory
        segments, areas = _find_segments((part.float().clamp(-1, 1) + 1) * 127.5)
        results = _recognise_styles(segments, areas) if areas else []
        owner = segments.picture.tolist()
        recognised = []
        names = _nearest(segments.background, BACKGROUNDS, BACKGROUND_TOLERANCE)
        for b, name in enumerate(names):
            pairs = [pair for picture, pair in zip(owner, results) if picture == b and pair]
            styles = {style for o, style in pairs if o.shape} or {"filled"}
            style = styles.pop() if len(styles) == 1 else None
            recognised.append(Scene(tuple(o for o, _ in pairs), name, style))
        scenes += _compare(recognised, segments.rgb)
    return scenes


def same_scene(truth, judged, unit):
    """Return whether a judged scene is the true one, with centres at most two pixels away.

    unit: pixels of the picture's shorter side.
    """
    def same(a, b):
        return a[:3] == b[:3] and math.hypot(a.x - b.x, a.y - b.y) * unit <= 2

    return (truth[1:] == judged[1:] and len(truth.objects) == len(judged.objects)
            and any(all(map(same, truth.objects, order)) for order in permutations(judged.objects)))


def _compare(scenes, rgb):
    """Return the scenes of pictures (B, 3, H, W), each with one more object if its drawing differs.

    Only scenes of which all is recognised are drawn. The additional object lies where the picture
    differs most, and nothing else is known of it.
    """
    scenes = list(scenes)
    known = [i for i, scene in enumerate(scenes) if _is_known(scene)]
    if not known:
        return scenes
    height, width = rgb.shape[2:]
    packed = shapes.pack([scenes[i] for i in known])
    drawn = (shapes.render(packed, height, width, rgb.device) + 1) * 127.5            # (K, 3, H, W)
    window = dict(kernel_size=2 * EDGE + 1, stride=1, padding=EDGE)
    span = F.max_pool2d(drawn, **window) + F.max_pool2d(-drawn, **window)             # (K, 3, H, W)
    difference = (rgb[known] - drawn).norm(dim=1)                                     # (K, H, W)
    difference = torch.where(span.amax(1) < 1, difference, 0)                         # (K, H, W)
    largest, place = difference.flatten(1).max(1)                                     # (K,), (K,)
    for i, value, index in zip(known, largest.tolist(), place.tolist()):
        if value > DIFFERENCE:
            x = (index % width + 0.5) / min(height, width)
            y = (index // width + 0.5) / min(height, width)
            stray = Object(None, None, None, x, y)
            scenes[i] = scenes[i]._replace(objects=(*scenes[i].objects, stray))
    return scenes


def _is_known(scene):
    """Return whether all of a judged scene is recognised, and it could be one of this world."""
    return (None not in scene and not any(None in o for o in scene.objects)
            and len(scene.objects) <= shapes.MAX_OBJECTS)


def _find_segments(rgb):
    """Return the Segments of pictures (B, 3, H, W), and a list of their areas in pixels."""
    B, _, H, W = rgb.shape
    border = torch.cat([rgb[:, :, :2].flatten(2), rgb[:, :, -2:].flatten(2),
                        rgb[:, :, :, :2].flatten(2), rgb[:, :, :, -2:].flatten(2)], 2)
    background = border.median(2).values                                              # (B, 3)
    label = _components((rgb - background[:, :, None, None]).norm(dim=1) > NOT_BACKGROUND)
    offset = torch.arange(B, device=rgb.device)[:, None, None] * H * W
    area = torch.bincount((label + offset)[label >= 0], minlength=B * H * W)
    roots = (area >= max(6, SMALLEST * H * W)).nonzero()[:, 0]                        # (O,)
    segments = Segments(rgb, background, label, roots // (H * W), roots % (H * W))
    return segments, area[roots].tolist()


def _components(mask):
    """Label each pixel of masks (B, H, W) with its 8-connected component's largest index, or -1."""
    B, H, W = mask.shape
    index = torch.arange(H * W, device=mask.device, dtype=torch.float32).view(1, H, W)
    label = torch.where(mask, index, -1.0)                                            # (B, H, W)
    while True:
        spread = torch.where(mask, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], -1.0)
        root = spread.flatten(1)                                                      # (B, H*W)
        root = root.gather(1, root.long().clamp(min=0)).view(B, H, W)  # jump to the label's label
        new = torch.where(mask, root, -1.0)
        if torch.equal(new, label):
            return label.long()
        label = new


def _nearest(colours, table, tolerance):
    """Return the name of the table's colour that is near to each of (O, 3), None if none is."""
    distance, index = torch.cdist(colours, shapes.palette(table, colours.device)).min(1)
    near = (distance < tolerance).tolist()
    return [tuple(table)[i] if known else None for i, known in zip(index.tolist(), near)]


def _recognise_styles(segments, areas):
    """Return (object, style) of each segment: as an outline if it is no filled shape.

    The outline of a ring is two circles. If two segments with the same centre are no filled shapes,
    they get one label, the earlier one is recognised as both, and the later one becomes None.
    """
    results = [(o, "filled") for o in _recognise(segments, "filled")]
    picture = segments.picture.tolist()
    unknown = []
    for i, (o, _) in enumerate(results):
        if o.shape:
            continue
        twins = [j for j in unknown if picture[i] == picture[j] and 0.4 < areas[i] / areas[j] < 2.5
                 and math.hypot(results[j][0].x - o.x, results[j][0].y - o.y) < 0.02]
        if twins:
            label = segments.label[picture[i]]
            label[label == segments.root[i]] = segments.root[twins[0]]
            results[i] = None
        else:
            unknown.append(i)
    if unknown:
        rest = segments._replace(picture=segments.picture[unknown], root=segments.root[unknown])
        for i, o in zip(unknown, _recognise(rest, "outlined")):
            if o.shape:
                results[i] = o, "outlined"
    return results


def _recognise(segments, style):
    """Return an Object for each segment, drawn in one style."""
    unit = min(segments.label.shape[1:])
    windows = _cut_windows(segments, unit)
    colour = _find_colour(windows, style)
    alpha = _measure_coverage(windows, colour)
    x, y, error, shape, size = _match(alpha, windows.offset, unit, style)
    mixed = _is_mixed(windows, colour, alpha, style)                                  # (O,)
    x = (windows.x + x + 0.5) / unit                                                  # (O,)
    y = (windows.y + y + 0.5) / unit                                                  # (O,)
    objects = []
    for i, name in enumerate(_nearest(colour, COLOURS, COLOUR_TOLERANCE[style])):
        o = Object(None, None if mixed[i] else name, None, x[i].item(), y[i].item())
        if error[i].item() < SHAPE_TOLERANCE[style]:
            o = o._replace(shape=SHAPES[shape[i]], size=tuple(SIZES)[size[i]])
        objects.append(o)
    return objects


def _cut_windows(segments, unit):
    """Cut Windows around the centres of gravity of segments, as large as any object."""
    rgb, background, label, picture, root = segments
    device = rgb.device
    half = math.ceil(1.2 * SIZES["large"] * unit) + 3
    mask = label[picture] == root[:, None, None]                                      # (O, H, W)
    area = mask.flatten(1).sum(1)                                                     # (O,)
    y = ((mask.sum(2) * torch.arange(mask.shape[1], device=device)).sum(1) / area).round().long()
    x = ((mask.sum(1) * torch.arange(mask.shape[2], device=device)).sum(1) / area).round().long()
    offset = torch.arange(-half, half + 1, device=device)
    rows = y[:, None] + half + offset                                                 # (O, P)
    columns = x[:, None] + half + offset                                              # (O, P)
    index = picture[:, None, None], rows[:, :, None], columns[:, None, :]
    pixels = F.pad(rgb, [half] * 4, value=-1e4).permute(0, 2, 3, 1)[index]            # (O, P, P, 3)
    label = F.pad(label, [half] * 4, value=-2)[index]                                 # (O, P, P)
    segment = label == root[:, None, None]                                            # (O, P, P)
    paper = background[picture][:, None, None]                                        # (O, 1, 1, 3)
    return Windows(pixels, label, segment, paper, x, y, offset)


def _find_colour(windows, style):
    """Return the median colour of each segment: (O, 3).

    The line of an outline is mostly soft edge. There only the eighth of its pixels that differs
    most from the background has its colour.
    """
    contrast = (windows.pixels - windows.paper).norm(dim=-1)                          # (O, P, P)
    contrast = torch.where(windows.segment, contrast, torch.nan)                      # (O, P, P)
    if style == "outlined":
        rank = 7 * windows.segment.flatten(1).sum(1, keepdim=True) // 8               # (O, 1)
        least = contrast.flatten(1).sort(1).values.gather(1, rank)                    # (O, 1)
        contrast = contrast.where(contrast >= least[..., None], torch.nan)            # (O, P, P)
    chosen = ~contrast.isnan()[..., None]                                             # (O, P, P, 1)
    return windows.pixels.where(chosen, torch.nan).flatten(1, 2).nanmedian(1).values  # (O, 3)


def _measure_coverage(windows, colour):
    """Return the share of each pixel that has the colour (O, 3) of its segment: (O, P, P).

    An object also covers part of the pixels around its segment, but none of its neighbours' edges.
    """
    ink = colour[:, None, None] - windows.paper                                       # (O, 1, 1, 3)
    near = F.max_pool2d(windows.segment[:, None].float(), 3, 1, 1)[:, 0] > 0          # (O, P, P)
    keep = windows.segment | (near & (windows.label == -1))                           # (O, P, P)
    alpha = ((windows.pixels - windows.paper) * ink).sum(-1) / ink.square().sum(-1)   # (O, P, P)
    return torch.where(keep, alpha, 0).clamp(0, 1)                                    # (O, P, P)


def _is_mixed(windows, colour, alpha, style):
    """Return whether over a tenth of each segment, but for soft edges, has another colour: (O,)."""
    colour = colour[:, None, None]                                                    # (O, 1, 1, 3)
    if style == "outlined":
        inner = windows.segment
        ink = alpha[..., None] * (colour - windows.paper)                             # (O, P, P, 3)
        difference = windows.pixels - windows.paper - ink                             # (O, P, P, 3)
    else:
        inner = F.max_pool2d((~windows.segment)[:, None].float(), 3, 1, 1)[:, 0] == 0  # (O, P, P)
        difference = windows.pixels - colour                                          # (O, P, P, 3)
    stray = difference.norm(dim=-1) > COLOUR_TOLERANCE[style]                         # (O, P, P)
    return (stray & inner).sum((1, 2)) / inner.sum((1, 2)) > 0.1


def _match(alpha, offset, unit, style):
    """Find the shape and size whose drawing is nearest to the coverage alpha (O, P, P).

    Return the centres x and y relative to the window's, the error relative to the drawing's energy,
    and indices into SHAPES and SIZES, each (O,).
    """
    area = alpha.sum((1, 2))                                                          # (O,)
    x = (alpha.sum(1) * offset).sum(1) / area                                         # (O,)
    y = (alpha.sum(2) * offset).sum(1) / area                                         # (O,)
    columns = offset - x[:, None, None]                                               # (O, 1, P)
    rows = offset[:, None] - y[:, None, None]                                         # (O, P, 1)
    radii = torch.tensor(list(SIZES.values()), device=alpha.device) * unit
    line = STYLES[style]
    errors = []
    sizes = []
    for shape in SHAPES:
        areas = [shapes.coverage(shape, offset.float(), offset[:, None].float(), radius,
                                 line * radius).sum() for radius in radii]
        size = (area[:, None].log() - torch.stack(areas).log()).abs().argmin(1)       # (O,)
        radius = radii[size][:, None, None]                                           # (O, 1, 1)
        drawn = shapes.coverage(shape, columns, rows, radius, line * radius)          # (O, P, P)
        error = (drawn - alpha).square().sum((1, 2))                                  # (O,)
        errors.append(error / drawn.square().sum((1, 2)))                             # (O,)
        sizes.append(size)
    error, best = torch.stack(errors).min(0)                                          # (O,), (O,)
    return x, y, error, best, torch.stack(sizes).gather(0, best[None])[0]             # (O,) each
