"""What the page says, in English and in Chinese."""

from __future__ import annotations

from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
NAMES: dict[Language, str] = {"en": "English", "zh": "中文"}

WORDS: dict[str, dict[Language, str]] = {
    "ask": {
        "en": "Ask about a picture: drop, paste or choose some, and type a question",
        "zh": "就图片提问：拖入、粘贴或选择图片（可多张），再输入问题",
    },
    "ask_default": {
        "en": "Add a picture and send; without a question this is asked: {prompt}",
        "zh": "添加图片后发送；不写问题时默认提问：{prompt}",
    },
    "empty": {
        "en": "Show a picture and ask.",
        "zh": "添加一张图片，开始提问。",
    },
    "again": {"en": "Regenerate", "zh": "重新生成"},
    "clear": {"en": "Clear", "zh": "清空"},
    "sampling": {"en": "Sampling", "zh": "采样设置"},
    "temperature": {"en": "Temperature", "zh": "温度"},
    "temperature_info": {
        "en": "0 takes the likeliest token",
        "zh": "0 表示每步取概率最大的词元",
    },
    "top_p": {"en": "Top-p", "zh": "Top-p"},
    "top_p_info": {
        "en": "Draw only from the likeliest tokens that reach this probability",
        "zh": "只在累计概率达到该值的词元中抽取",
    },
    "max_tokens": {"en": "Longest answer, in tokens", "zh": "回答的最大词元数"},
    "seed": {"en": "Seed", "zh": "随机种子"},
    "seed_info": {"en": "Empty: another one each time", "zh": "留空则每次不同"},
    "examples": {"en": "Examples from the validation set", "zh": "验证集样例"},
    "examples_info": {
        "en": "Choose one; its expected answer is shown beside the model's.",
        "zh": "点选一个样例；标准答案会显示在模型回答之后。",
    },
    "base": {"en": "base", "zh": "微调前"},
    "tuned": {"en": "tuned", "zh": "微调后"},
    "raw": {"en": "Raw text", "zh": "原始文本"},
    "truth": {"en": "Expected answer", "zh": "标准答案"},
    "count": {
        "en": "{prompt} + {tokens} tokens, {seconds:.1f} s",
        "zh": "{prompt} + {tokens} 词元，{seconds:.1f} 秒",
    },
    "cut": {
        "en": "Cut at the longest answer; Sampling allows more.",
        "zh": "已达到最大词元数而截断；可在采样设置中调大。",
    },
    "stopped": {"en": "Broken off.", "zh": "已停止。"},
    "silent": {"en": "(an empty answer)", "zh": "（回答为空）"},
    "failed": {"en": "No answer: {reason}", "zh": "未能回答：{reason}"},
    "nothing_asked": {
        "en": "There is nothing to ask yet: type a question or add a picture.",
        "zh": "还没有内容：请输入问题或添加图片。",
    },
    "no_prompt": {
        "en": "Say what to do with the picture: this model has no question of its own.",
        "zh": "请写明要对图片做什么：该模型没有默认问题。",
    },
    "too_many": {
        "en": "{found} pictures in this conversation, at most {most} are allowed; clear it first.",
        "zh": "本次对话共有 {found} 张图片，最多允许 {most} 张；请先清空。",
    },
    "too_large": {
        "en": "{name} has {found:.1f} MB, at most {most:.0f} MB are allowed.",
        "zh": "{name} 大小为 {found:.1f} MB，最大允许 {most:.0f} MB。",
    },
    "too_long": {
        "en": "The conversation has {found} characters, at most {most} are allowed.",
        "zh": "对话共有 {found} 个字符，最多允许 {most} 个。",
    },
    "bad_picture": {
        "en": "{name} cannot be used: {reason}",
        "zh": "{name} 无法使用：{reason}",
    },
}


def say(language: Language, key: str, **values: object) -> str:
    """A phrase in a language."""
    return WORDS[key][language].format(**values)


def preferred(accepted: str) -> Language:
    """The language for a browser's ``Accept-Language``."""
    first = accepted.strip().lower()
    return "zh" if first.startswith("zh") else "en"


def chosen(name: object) -> Language:
    """The language of a switch's position; anything unknown is English."""
    return next((each for each in LANGUAGES if NAMES[each] == name), "en")
