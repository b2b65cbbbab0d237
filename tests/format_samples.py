"""A row or two of every format, as their own documentation and data write them."""

from __future__ import annotations

from typing import Any

from vlmtune.data.formats import FORMATS, Draft, detect
from vlmtune.data.layouts import rows_of_document

Rows = list[dict[str, Any]]

ANSWER = {"role": "assistant", "content": "A dog."}
TEXT_ONLY = {"role": "user", "content": "Who are you?"}

COCO_CAPTIONS = {
    "info": {"year": 2014},
    "licenses": [],
    "images": [
        {"id": 391895, "file_name": "1.png", "width": 640, "height": 360},
        {"id": 522418, "file_name": "2.png", "width": 640, "height": 480},
    ],
    "annotations": [
        {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet."},
        {"image_id": 522418, "id": 695774, "caption": "A woman cutting a cake."},
        {"image_id": 391895, "id": 771687, "caption": "Man riding a motor bike."},
    ],
}
COCO_BOXES = {
    "images": [{"id": 1, "file_name": "1.png", "width": 640, "height": 480}],
    "categories": [{"id": 3, "name": "car"}, {"id": 7, "name": "person"}],
    "annotations": [
        {"id": 9, "image_id": 1, "category_id": 7, "bbox": [10.5, 20, 30, 40.25], "iscrowd": 0},
        {"id": 8, "image_id": 1, "category_id": 3, "bbox": [0, 0, 640, 480], "iscrowd": 0},
        {"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 1, 1, 1], "iscrowd": 1},
    ],
}

# (format, what it is, rows)
SAMPLES: list[tuple[str, str, Rows]] = [
    ("table", "images and texts", [{"image_path": "0.jpg", "text": "x^2"}]),
    ("table", "ModelScope's captions", [{"image_id": 57870, "image": b"x", "caption": "a&&b"}]),
    (
        "table",
        "document questions",
        [
            {
                "id": "train_0",
                "image": {"bytes": b"x", "path": None},
                "query": {"de": "Was?", "en": "What?", "es": None},
                "answers": ["T.F. Riehl", "Riehl"],
                "words": ["a"],
                "bounding_boxes": [[0.1, 0.2, 0.3, 0.4]],
                "answer": {"match_score": 1.0, "text": "T.F. Riehl", "start": 17},
            }
        ],
    ),
    ("table", "questions only", [{"question": "1+1?", "answer": "2"}]),
    ("imagefolder", "metadata", [{"file_name": "0001.png", "text": "a dog"}]),
    ("imagefolder", "classes", [{"file_name": "cat/1.png", "label": "cat"}]),
    (
        "tutorial-ocr",
        "OCR",
        [
            {
                "id": "identity_1",
                "conversations": [
                    {"role": "user", "value": "/data/LaTeX OCR/0.jpg"},
                    {"role": "assistant", "value": r"\frac{1}{2}"},
                ],
            }
        ],
    ),
    (
        "tutorial-caption",
        "captions",
        [
            {
                "id": "identity_1",
                "conversations": [
                    {"from": "user", "value": "COCO Yes: <|vision_start|>/c/1.jpg<|vision_end|>"},
                    {"from": "assistant", "value": "A cat."},
                ],
            }
        ],
    ),
    (
        "qwen-vl",
        "text, one image, several images",
        [
            {
                "id": "identity_0",
                "conversations": [
                    {"from": "user", "value": "你好"},
                    {"from": "assistant", "value": "我是Qwen-VL,一个支持视觉输入的大模型。"},
                ],
            },
            {
                "id": "identity_1",
                "conversations": [
                    {
                        "from": "user",
                        "value": "Picture 1: <img>https://x.org/demo.jpeg</img>\n图中的狗是什么品种？",
                    },
                    {"from": "assistant", "value": "图中是一只拉布拉多犬。"},
                    {"from": "user", "value": "框出图中的格子衬衫"},
                    {
                        "from": "assistant",
                        "value": "<ref>格子衬衫</ref><box>(588,499),(725,789)</box>",
                    },
                ],
            },
        ],
    ),
    (
        "qwen-vl",
        "text only",
        [{"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}],
    ),
    (
        "llava",
        "an image, and text only",
        [
            {
                "id": "000000033471",
                "image": "coco/train2017/000000033471.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
                    {"from": "gpt", "value": "White and red."},
                    {"from": "human", "value": "Where is it?"},
                    {"from": "gpt", "value": "On the street."},
                ],
            },
            {
                "id": "wgByO4Y_0",
                "conversations": [
                    {"from": "human", "value": "Write a poem."},
                    {"from": "gpt", "value": "Roses."},
                ],
            },
        ],
    ),
    (
        "llava",
        "several images",
        [
            {
                "image": ["a.png", "b.png"],
                "conversations": [
                    {"from": "human", "value": "<image>\n<image>\nWhich?"},
                    {"from": "gpt", "value": "The first."},
                ],
            }
        ],
    ),
    (
        "sharegpt",
        "messages with placeholders",
        [
            {
                "messages": [
                    {"role": "user", "content": "<image>Who are they?"},
                    {"role": "assistant", "content": "Kane and Gretzka."},
                ],
                "images": ["mllm_demo_data/1.jpg"],
            },
            {"messages": [TEXT_ONLY, ANSWER], "images": []},
        ],
    ),
    (
        "sharegpt",
        "conversations from human and gpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "<image>What?"},
                    {"from": "gpt", "value": "x"},
                ],
                "images": ["1.png"],
                "system": "Be brief.",
            }
        ],
    ),
    (
        "sharegpt",
        "conversations with role and content",
        [{"conversations": [TEXT_ONLY, ANSWER], "images": None}],
    ),
    (
        "openai",
        "parts with data and other URLs",
        [
            {
                "messages": [
                    {"role": "system", "content": "You identify cheeses."},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is this?"},
                            {
                                "type": "image_url",
                                "image_url": {
                                    "url": "data:image/png;base64,AAAA",
                                    "detail": "low",
                                },
                            },
                            {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}},
                        ],
                    },
                    {"role": "assistant", "content": "Danbo"},
                ]
            }
        ],
    ),
    ("openai", "text only", [{"messages": [TEXT_ONLY, ANSWER]}]),
    (
        "trl",
        "messages with parts",
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "text": None},
                            {"type": "text", "text": "What colour?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]},
                ],
                "images": [{"bytes": b"x", "path": None}],
            }
        ],
    ),
    ("trl", "messages with texts", [{"messages": [TEXT_ONLY, ANSWER], "images": ["1.png"]}]),
    ("trl", "prompt and completion", [{"prompt": "The sky is", "completion": " blue."}]),
    (
        "trl",
        "prompt and completion as turns",
        [{"prompt": [TEXT_ONLY], "completion": [ANSWER], "images": ["1.png"]}],
    ),
    (
        "ms-swift",
        "boxes",
        [
            {
                "messages": [
                    {"role": "user", "content": "<image>Describe the image."},
                    {
                        "role": "assistant",
                        "content": "<ref-object><bbox> and <ref-object><bbox> play on the beach",
                    },
                ],
                "images": ["/xxx/x.jpg"],
                "objects": {
                    "ref": ["a dog", "a woman"],
                    "bbox": [[331.5, 761.4, 853.5, 1594.8], [676.5, 685.8, 1099.5, 1427.4]],
                },
            }
        ],
    ),
    (
        "ms-swift",
        "query and response",
        [
            {
                "system": "Be brief.",
                "query": "And this?",
                "response": "A cat.",
                "history": [["<img>1.png</img>What?", "A dog."]],
            }
        ],
    ),
    (
        "ms-swift",
        "image tags",
        [{"messages": [{"role": "user", "content": "<img>1.png</img>What?"}, ANSWER]}],
    ),
    ("coco", "captions", rows_of_document(COCO_CAPTIONS) or []),
    ("coco", "boxes", rows_of_document(COCO_BOXES) or []),
]


def rows_of(name: str, what: str) -> Rows:
    """The sample of a format."""
    return next(rows for found, told, rows in SAMPLES if (found, told) == (name, what))


def read(rows: Rows, name: str = "auto", **columns: str) -> list[Draft]:
    """The drafts of rows."""
    reader = FORMATS[detect(rows, name).name].reader(rows, columns)
    return [reader(row) for row in rows]
